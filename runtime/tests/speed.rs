//! How long pods take. Not a promise held on every machine: ignored unless asked for, as it
//! needs an idle machine and an optimised build to say anything.

mod support;

use runtime::service::{Resources, RuntimeService};
use std::sync::Arc;
use std::time::Instant;
use support::{Node, pod, script};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement, not a test"]
async fn pods_one_by_one_and_a_hundred_at_once() {
    let node = Arc::new(Node::new());
    let engine = node.open().await;
    for (count, parallel) in [(10, false), (100, true)] {
        let started = Instant::now();
        let mut tasks = Vec::new();
        for number in 0..count {
            let (with_engine, node) = (engine.clone(), Arc::clone(&node));
            let task = tokio::spawn(async move {
                let begun = Instant::now();
                let mut config = pod(&node, &format!("{parallel}{number}"));
                config.network = runtime::service::NamespaceMode::Pod;
                with_engine
                    .ensure_cgroup(&config.cgroup_parent, &Resources::default())
                    .unwrap();
                let at_cgroup = begun.elapsed();
                let sandbox = with_engine.run_sandbox(config).await.unwrap();
                let at_sandbox = begun.elapsed();
                let config = script("main", "exec sleep 1000");
                let id = with_engine
                    .create_container(&sandbox.id, config)
                    .await
                    .unwrap();
                let at_create = begun.elapsed();
                with_engine.start_container(&id).await.unwrap();
                let times = (at_cgroup, at_sandbox, at_create, begun.elapsed());
                (sandbox.id, times)
            });
            if parallel {
                tasks.push(task);
            } else {
                let (id, times) = task.await.unwrap();
                println!("cgroup, sandbox, create, start: {times:?}");
                let begun = Instant::now();
                engine.remove_sandbox(&id).await.unwrap();
                println!("remove: {:?}", begun.elapsed());
            }
        }
        let mut ids = Vec::new();
        for task in tasks {
            ids.push(task.await.unwrap().0);
        }
        println!("{count} pods: {:?}", started.elapsed());
        let started = Instant::now();
        let removals = ids.iter().map(|id| engine.remove_sandbox(id));
        for outcome in futures::future::join_all(removals).await {
            outcome.unwrap();
        }
        println!("removed: {:?}", started.elapsed());
    }
}
