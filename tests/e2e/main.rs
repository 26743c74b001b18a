//! The scenarios: what a user of a cluster sees of a node, on a real control plane. Each is a
//! sentence. `cargo xtask test` brings a lab up for them; `FERRULE_LAB=<name>` runs them in another.

mod a_killed_agent_loses_nothing;
mod a_node_runs_its_own_control_plane;
mod bad_input_is_named_and_harms_nobody;
mod chaos_leaves_only_truth;
mod containers_are_confined;
mod containers_get_what_their_pod_says;
mod deployments_run_and_change;
mod disks_stay_clean;
mod drivers_bring_volumes;
mod full_disks_harm_nobody;
mod kills_at_any_moment_leave_nothing;
mod logs_and_exec_reach_containers;
mod networks_span_nodes;
mod nodes_register_and_report;
mod other_runtimes_use_our_networks;
mod persistent_volumes_keep_their_data;
mod pod_networks_span_nodes;
mod pods_end_in_order_and_can_be_debugged;
mod pods_start_over_and_give_way;
mod pods_start_restart_and_end;
mod probes_decide_readiness_and_restarts;
mod registries_that_lie_are_found_out;
mod resources_change_in_place;
mod services_lead_to_pods;
mod static_pods_need_no_apiserver;
mod streams_carry_every_byte;
mod the_apiserver_refuses_or_is_away;
mod the_node_can_be_measured_and_guarded;
mod volumes_hold_and_follow_their_sources;
