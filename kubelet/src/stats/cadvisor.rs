//! `/metrics/cadvisor`: the families of cAdvisor that dashboards use, with its label names. There
//! is no pause container here: what belongs to a pod as a whole (its network) is under the pod's
//! own cgroup, with an empty `container`.

use super::collect::{Filesystem, KUBEPODS, PodView, Stats, outer, pod_interfaces, started_ns};
use super::disk::Reader;
use super::machine;
use super::samples::{
    Subject, Writer, device_name, filesystem_samples, gauge, io_samples, network_samples,
    spec_samples, usage_samples,
};
use crate::metrics::text::Page;
use crate::node::machine::Machine;
use runtime::service::{
    CgroupDetails, CgroupStats, ContainerState, ContainerStatus, ImageService, RuntimeService,
};
use std::collections::BTreeMap;
use std::path::Path;

/// Descriptors looked at per container; more are told as so many.
const MAX_DESCRIPTORS: usize = 4096;

impl<R: RuntimeService + ImageService> Stats<R> {
    /// The page. Blocks: reads some twenty files per cgroup.
    pub fn cadvisor(&self, machine: &Machine) -> Page {
        let mut page = Page::new();
        machine_page(&mut page, machine);
        self.root(&mut page);
        let classes = [
            KUBEPODS.to_owned(),
            format!("{KUBEPODS}/burstable"),
            format!("{KUBEPODS}/besteffort"),
        ];
        for path in classes {
            let subject = Subject {
                id: self.absolute(&path),
                ..Subject::default()
            };
            self.cgroup_page(&mut page, &subject, &path, 0);
        }
        let reader = self.disk.reader();
        let filesystem = Filesystem::of(&self.config.runtime_root);
        let device = device_of(&self.config.runtime_root);
        for view in self.views() {
            self.pod_page(&mut page, &view);
            for container in view.containers.values() {
                let Some((subject, path)) = self.container_subject(&view, container) else {
                    continue;
                };
                self.cgroup_page(&mut page, &subject, &path, started_ns(container));
                if let Some(filesystem) = &filesystem {
                    self.layer_page(
                        &mut page,
                        &subject,
                        container,
                        &reader,
                        (filesystem, &device),
                    );
                }
                processes_page(&mut page, &subject, container);
            }
        }
        page.put(
            gauge(
                "container_scrape_error",
                "1 when metrics of containers could not be had, else 0.",
            ),
            &[],
            0.0,
        );
        page
    }

    /// A cgroup's path from the root of the machine.
    fn absolute(&self, path: &str) -> String {
        let root = self.config.cgroup_root.trim_end_matches('/');
        format!("{root}{path}")
    }

    /// The whole machine as the container `/`.
    fn root(&self, page: &mut Page) {
        let usage = machine::usage();
        let subject = Subject {
            id: "/".to_owned(),
            ..Subject::default()
        };
        let now = jiff::Timestamp::now();
        let stats = CgroupStats {
            time_ns: i64::try_from(now.as_nanosecond()).unwrap_or(0),
            cpu_usage_ns: usage.cpu_usage_ns,
            memory_usage_bytes: usage.memory_usage,
            memory_working_set_bytes: usage.memory_working_set,
            memory_rss_bytes: usage.memory_rss,
            memory_inactive_file_bytes: usage.memory_usage - usage.memory_working_set,
            page_faults: usage.page_faults,
            major_page_faults: usage.major_page_faults,
            swap_usage_bytes: usage.swap_usage,
            pressure: usage.pressure,
            ..CgroupStats::default()
        };
        let details = CgroupDetails {
            cpu_user_ns: usage.cpu_user_ns,
            cpu_system_ns: usage.cpu_usage_ns.saturating_sub(usage.cpu_user_ns),
            memory_cache: usage.memory_cache,
            memory_mapped_file: usage.memory_mapped,
            ..CgroupDetails::default()
        };
        let mut writer = Writer {
            page,
            subject: &subject,
            at_ms: now.as_millisecond(),
        };
        usage_samples(&mut writer, &stats, &details);
        for interface in outer(&linux::netdev::interfaces(None).unwrap_or_default()) {
            network_samples(&mut writer, interface);
        }
        if let Some(fs) = Filesystem::of(&self.config.root_dir) {
            let device = device_of(&self.config.root_dir);
            filesystem_samples(&mut writer, &fs, &device, fs.used());
        }
    }

    fn pod_page(&self, page: &mut Page, view: &PodView) {
        let config = &view.sandbox.config;
        let mut subject = Subject {
            id: self.absolute(&config.cgroup_parent),
            namespace: config.namespace.clone(),
            pod: config.name.clone(),
            ..Subject::default()
        };
        let started = view.sandbox.created_at_ns;
        self.cgroup_page(page, &subject, &config.cgroup_parent, started);
        let Some(interfaces) = pod_interfaces(view) else {
            return;
        };
        view.sandbox.id.0.clone_into(&mut subject.name);
        let mut writer = Writer {
            page,
            subject: &subject,
            at_ms: jiff::Timestamp::now().as_millisecond(),
        };
        for interface in outer(&interfaces) {
            network_samples(&mut writer, interface);
        }
    }

    fn container_subject(
        &self,
        view: &PodView,
        container: &ContainerStatus,
    ) -> Option<(Subject, String)> {
        let place = self.runtime.container_place(&container.id)?;
        let subject = Subject {
            container: container.config.name.clone(),
            id: self.absolute(&place.cgroup),
            image: container.config.user_image.clone(),
            name: container.id.0.clone(),
            namespace: view.sandbox.config.namespace.clone(),
            pod: view.sandbox.config.name.clone(),
        };
        Some((subject, place.cgroup))
    }

    /// CPU, memory, devices, processes and limits of one cgroup.
    fn cgroup_page(&self, page: &mut Page, subject: &Subject, path: &str, started_ns: i64) {
        let stats = self.runtime.cgroup_stats(path);
        let details = self.runtime.cgroup_details(path);
        let (Some(stats), Some(details)) = (stats, details) else {
            return;
        };
        let mut writer = Writer {
            page,
            subject,
            at_ms: stats.time_ns / 1_000_000,
        };
        usage_samples(&mut writer, &stats, &details);
        io_samples(&mut writer, &details);
        spec_samples(&mut writer, &stats, &details, started_ns);
    }

    /// What a container wrote to its root filesystem.
    fn layer_page(
        &self,
        page: &mut Page,
        subject: &Subject,
        container: &ContainerStatus,
        reader: &Reader<'_>,
        (filesystem, device): (&Filesystem, &str),
    ) {
        let Some(written) = self.written(container, reader) else {
            return;
        };
        let mut writer = Writer {
            page,
            subject,
            at_ms: jiff::Timestamp::now().as_millisecond(),
        };
        filesystem_samples(&mut writer, filesystem, device, written.bytes);
    }
}

/// Descriptors, sockets and the limit of the container's first process.
fn processes_page(page: &mut Page, subject: &Subject, container: &ContainerStatus) {
    let ContainerState::Running { pid, .. } = container.state else {
        return;
    };
    let mut writer = Writer {
        page,
        subject,
        at_ms: jiff::Timestamp::now().as_millisecond(),
    };
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
        return;
    };
    let (mut all, mut sockets) = (0u32, 0u32);
    for entry in entries.flatten().take(MAX_DESCRIPTORS) {
        all += 1;
        let target = std::fs::read_link(entry.path()).unwrap_or_default();
        sockets += u32::from(target.to_string_lossy().starts_with("socket:"));
    }
    writer.put(
        gauge(
            "container_file_descriptors",
            "Open file descriptors of the container's first process.",
        ),
        all.into(),
    );
    writer.put(
        gauge(
            "container_sockets",
            "Open sockets of the container's first process.",
        ),
        sockets.into(),
    );
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
    let files = limits
        .lines()
        .find_map(|l| l.strip_prefix("Max open files"));
    let soft = files.and_then(|l| l.split_whitespace().next());
    let soft = soft.map(|word| word.parse().unwrap_or(-1.0));
    if let Some(soft) = soft {
        let family = gauge(
            "container_ulimits_soft",
            "Soft limits of the container's first process, -1 for none.",
        );
        writer.put_with(family, &[("ulimit", "max_open_files")], soft);
    }
}

/// The device a directory is on.
fn device_of(path: &Path) -> String {
    match rustix::fs::stat(path) {
        Ok(stat) => device_name(
            rustix::fs::major(stat.st_dev),
            rustix::fs::minor(stat.st_dev),
        ),
        Err(_) => String::new(),
    }
}

/// Distinct values of a field of `/proc/cpuinfo`, together with another's.
fn distinct(cpuinfo: &str, fields: &[&str]) -> usize {
    let mut found = std::collections::BTreeSet::new();
    for cpu in cpuinfo.split("\n\n") {
        let values: BTreeMap<&str, &str> = cpu
            .lines()
            .filter_map(|l| l.split_once(':'))
            .map(|(k, v)| (k.trim(), v.trim()))
            .collect();
        let key: Option<Vec<&str>> = fields.iter().map(|f| values.get(f).copied()).collect();
        found.extend(key);
    }
    found.len()
}

fn machine_page(page: &mut Page, machine: &Machine) {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let labels = [
        ("boot_id", machine.boot_id.as_str()),
        ("machine_id", machine.machine_id.as_str()),
        ("system_uuid", machine.system_uuid.as_str()),
    ];
    page.put(
        gauge("cadvisor_version_info", "1, labelled by versions."),
        &[
            ("cadvisorRevision", ""),
            ("cadvisorVersion", ""),
            ("dockerVersion", ""),
            ("kernelVersion", machine.kernel_version.as_str()),
            ("osVersion", machine.os_image.as_str()),
        ],
        1.0,
    );
    for (name, help, value) in [
        (
            "machine_cpu_physical_cores",
            "Physical CPU cores.",
            distinct(&cpuinfo, &["physical id", "core id"]) as u64,
        ),
        ("machine_cpu_cores", "Logical CPU cores.", machine.cpus),
        (
            "machine_cpu_sockets",
            "CPU sockets.",
            distinct(&cpuinfo, &["physical id"]) as u64,
        ),
        (
            "machine_memory_bytes",
            "Memory of the machine in bytes.",
            machine.memory_bytes,
        ),
        (
            "machine_swap_bytes",
            "Swap of the machine in bytes.",
            machine.swap_bytes,
        ),
    ] {
        page.put(gauge(name, help), &labels, value as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_and_cores_are_told_apart() {
        let text = "processor: 0\nphysical id : 0\ncore id : 0\n\nprocessor: 1\nphysical id : 0\n\
                    core id : 1\n\nprocessor: 2\nphysical id : 0\ncore id : 1\n";
        assert_eq!(distinct(text, &["physical id"]), 1);
        assert_eq!(distinct(text, &["physical id", "core id"]), 2);
        assert_eq!(distinct("", &["physical id"]), 0);
    }
}
