//! What plugins that give a container an interface have in common, whatever the interface hangs on.
//!
//! * [`names`]: links and hardware addresses, from the attachment alone.
//! * [`address`]: where addresses come from: the allocator in this process, or another plugin.
//! * [`rules`]: host ports and what else it has in the packet filter.
//! * [`plan`]: gateways, routes and the changes inside the container, pure.

pub mod address;
pub mod names;
pub mod plan;
pub mod rules;
