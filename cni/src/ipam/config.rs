//! The `ipam` object of host-local, with its keys and defaults.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde_json::{Map, Value};

use super::{DEFAULT_DIR, Pool, Range, RangeSet};
use crate::types::{Dns, Route};

/// An `ipam` object that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} {problem}")]
pub struct ConfigError {
    /// Path of the field, as `ipam.ranges[0][1].subnet`.
    pub field: String,
    /// What is wrong with it.
    pub problem: String,
}

/// The object, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostLocal {
    /// Addresses to give. Empty when the configuration names none: then ranges come with each ADD
    /// (`ipRanges`), and the other verbs do without, for they are not told them.
    pub pool: Pool,
    /// Routes for the container.
    pub routes: Vec<Route>,
    /// Resolver settings from `resolvConf`.
    pub dns: Dns,
    /// Where leases are kept.
    pub dir: PathBuf,
    /// Addresses asked for.
    pub wanted: Vec<IpAddr>,
}

type Result<T> = std::result::Result<T, ConfigError>;

fn wrong<T>(field: impl Into<String>, problem: impl Into<String>) -> Result<T> {
    Err(ConfigError {
        field: field.into(),
        problem: problem.into(),
    })
}

impl HostLocal {
    /// Reads `ipam`, and from the whole configuration `runtimeConfig.{ipRanges,ips}` and
    /// `args.cni.ips`; `arg_ip` is `IP` of `CNI_ARGS`.
    ///
    /// # Errors
    /// [`ConfigError`] naming the field.
    pub fn parse(conf: &Map<String, Value>, arg_ip: Option<&str>) -> Result<Self> {
        let Some(Value::Object(ipam)) = conf.get("ipam") else {
            return wrong("ipam", "is not an object");
        };
        let mut sets = Vec::new();
        let runtime = conf.get("runtimeConfig").and_then(Value::as_object);
        if let Some(ranges) = runtime.and_then(|r| r.get("ipRanges")) {
            sets.extend(range_sets(ranges, "runtimeConfig.ipRanges")?);
        }
        if ipam.contains_key("subnet") {
            sets.push(range_set(&[range(ipam, "ipam")?], "ipam")?);
        }
        if let Some(ranges) = ipam.get("ranges").filter(|ranges| !ranges.is_null()) {
            sets.extend(range_sets(ranges, "ipam.ranges")?);
        }
        let pool = Pool { sets };
        no_overlap(&pool)?;
        let dir = text(ipam, "dataDir", "ipam")?.map_or_else(|| DEFAULT_DIR.into(), PathBuf::from);
        if !dir.is_absolute() {
            return wrong("ipam.dataDir", format!("{dir:?} is not an absolute path"));
        }
        let dns = text(ipam, "resolvConf", "ipam")?
            .map(|p| resolv_conf(Path::new(&p)))
            .transpose()?;
        Ok(Self {
            pool,
            routes: routes(ipam.get("routes"), "ipam.routes")?,
            dns: dns.unwrap_or_default(),
            dir,
            wanted: wanted(conf, runtime, arg_ip)?,
        })
    }
}

fn no_overlap(pool: &Pool) -> Result<()> {
    let all: Vec<&Range> = pool.sets.iter().flat_map(RangeSet::ranges).collect();
    for (index, a) in all.iter().enumerate() {
        for b in &all[index + 1..] {
            let apart =
                a.start.is_ipv4() != b.start.is_ipv4() || a.end < b.start || b.end < a.start;
            if !apart {
                return wrong(
                    "ipam.ranges",
                    format!("{} and {} overlap", a.subnet, b.subnet),
                );
            }
        }
    }
    Ok(())
}

fn range_sets(value: &Value, at: &str) -> Result<Vec<RangeSet>> {
    let Value::Array(sets) = value else {
        return wrong(at, "is not a list of lists");
    };
    let mut all = Vec::new();
    for (i, set) in sets.iter().enumerate() {
        let at = format!("{at}[{i}]");
        let Value::Array(items) = set else {
            return wrong(at, "is not a list");
        };
        let mut ranges = Vec::new();
        for (j, item) in items.iter().enumerate() {
            let at = format!("{at}[{j}]");
            let Value::Object(item) = item else {
                return wrong(at, "is not an object");
            };
            ranges.push(range(item, &at)?);
        }
        all.push(range_set(&ranges, &at)?);
    }
    Ok(all)
}

fn range_set(ranges: &[Range], at: &str) -> Result<RangeSet> {
    RangeSet::new(ranges.to_vec()).or_else(|e| wrong(at, format!(": {e}")))
}

fn range(object: &Map<String, Value>, at: &str) -> Result<Range> {
    let Some(subnet) = text(object, "subnet", at)? else {
        return wrong(format!("{at}.subnet"), "is missing");
    };
    let subnet: IpNet = match subnet.parse() {
        Ok(subnet) => subnet,
        Err(_) => {
            return wrong(
                format!("{at}.subnet"),
                format!("{subnet:?} is not a network"),
            );
        }
    };
    let start = address(object, "rangeStart", at)?;
    let end = address(object, "rangeEnd", at)?;
    let gateway = address(object, "gateway", at)?;
    Range::new(subnet, start, end, gateway).or_else(|e| wrong(at, format!(": {e}")))
}

fn text(object: &Map<String, Value>, key: &str, at: &str) -> Result<Option<String>> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.is_empty() => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => wrong(format!("{at}.{key}"), format!("is {other}, not a string")),
    }
}

fn address(object: &Map<String, Value>, key: &str, at: &str) -> Result<Option<IpAddr>> {
    let Some(text) = text(object, key, at)? else {
        return Ok(None);
    };
    match text.parse() {
        Ok(address) => Ok(Some(address)),
        Err(_) => wrong(format!("{at}.{key}"), format!("{text:?} is not an address")),
    }
}

fn routes(value: Option<&Value>, at: &str) -> Result<Vec<Route>> {
    let items = match value {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(items)) => items,
        Some(_) => return wrong(at, "is not a list"),
    };
    let mut routes = Vec::new();
    for (index, item) in items.iter().enumerate() {
        let at = format!("{at}[{index}]");
        let Value::Object(item) = item else {
            return wrong(at, "is not an object");
        };
        let dst = text(item, "dst", &at)?.unwrap_or_default();
        let Ok(dst) = dst.parse::<IpNet>() else {
            return wrong(format!("{at}.dst"), format!("{dst:?} is not a network"));
        };
        let number = |key: &str| match item.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_u64().and_then(|n| u32::try_from(n).ok()) {
                Some(number) => Ok(Some(number)),
                None => wrong(
                    format!("{at}.{key}"),
                    format!("is {value}, not a whole number"),
                ),
            },
        };
        let mut route = Route::new(dst, address(item, "gw", &at)?);
        route.mtu = number("mtu")?;
        route.advmss = number("advmss")?;
        route.priority = number("priority")?;
        route.table = number("table")?;
        route.scope = number("scope")?.and_then(|scope| u8::try_from(scope).ok());
        routes.push(route);
    }
    Ok(routes)
}

/// Addresses asked for: by the runtime, else by `args`, else by the old environment argument.
fn wanted(
    conf: &Map<String, Value>,
    runtime: Option<&Map<String, Value>>,
    arg_ip: Option<&str>,
) -> Result<Vec<IpAddr>> {
    let by_args = conf
        .get("args")
        .and_then(|a| a.get("cni"))
        .and_then(|c| c.get("ips"));
    let (list, at) = match (runtime.and_then(|r| r.get("ips")), by_args, arg_ip) {
        (Some(list), _, _) => (list.clone(), "runtimeConfig.ips"),
        (None, Some(list), _) => (list.clone(), "args.cni.ips"),
        (None, None, Some(text)) => (Value::Array(vec![text.into()]), "CNI_ARGS IP"),
        (None, None, None) => return Ok(Vec::new()),
    };
    let Value::Array(items) = list else {
        return wrong(at, "is not a list");
    };
    let mut addresses = Vec::new();
    for item in &items {
        // With or without a prefix length, which the range decides.
        let text = item
            .as_str()
            .unwrap_or_default()
            .split('/')
            .next()
            .unwrap_or_default();
        match text.parse() {
            Ok(address) => addresses.push(address),
            Err(_) => return wrong(at, format!("holds {item}, which is not an address")),
        }
    }
    Ok(addresses)
}

fn resolv_conf(path: &Path) -> Result<Dns> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) => return wrong("ipam.resolvConf", format!("{path:?} cannot be read: {e}")),
    };
    let mut dns = Dns::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let key = words.next().unwrap_or_default();
        let values = words.map(str::to_owned);
        match key {
            "nameserver" => dns.nameservers.extend(values.take(1)),
            "domain" => dns.domain = values.take(1).collect(),
            // The last one counts, as in the resolver.
            "search" => dns.search = values.collect(),
            "options" => dns.options.extend(values),
            _ => {}
        }
    }
    Ok(dns)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(conf: &str, expected: &str) {
        let Value::Object(conf) = serde_json::from_str(conf).unwrap() else {
            panic!("no object")
        };
        let said = match HostLocal::parse(&conf, None) {
            Ok(parsed) => parsed.pool.fingerprint(),
            Err(error) => error.to_string(),
        };
        assert_eq!(said, expected);
    }

    #[test]
    fn both_spellings_of_ranges_are_read() {
        check(
            r#"{"ipam":{"subnet":"10.1.0.0/24"}}"#,
            "10.1.0.1-10.1.0.254~10.1.0.1",
        );
        check(
            r#"{"ipam":{"ranges":[[{"subnet":"10.1.0.0/24","rangeStart":"10.1.0.20","rangeEnd":"10.1.0.50","gateway":"10.1.0.254"}],[{"subnet":"fd00::/120"}]]}}"#,
            "10.1.0.20-10.1.0.50~10.1.0.254,fd00::1-fd00::ff~fd00::1",
        );
        check(
            r#"{"ipam":{},"runtimeConfig":{"ipRanges":[[{"subnet":"10.9.0.0/24"}]]}}"#,
            "10.9.0.1-10.9.0.254~10.9.0.1",
        );
    }

    #[test]
    fn ranges_may_be_missing_where_they_come_with_each_add() {
        check(r#"{"ipam":{}}"#, "");
    }

    #[test]
    fn a_bad_value_names_its_field() {
        check(
            r#"{"ipam":{"subnet":"ten"}}"#,
            r#"ipam.subnet "ten" is not a network"#,
        );
        check(
            r#"{"ipam":{"ranges":[[{"subnet":"10.1.0.0/24","gateway":"10.2.0.1"}]]}}"#,
            "ipam.ranges[0][0] : gateway 10.2.0.1 is not in subnet 10.1.0.0/24",
        );
        check(
            r#"{"ipam":{"ranges":[[{"subnet":"10.1.0.5/24"}]]}}"#,
            "ipam.ranges[0][0] : subnet 10.1.0.5/24 has host bits set; did you mean 10.1.0.0/24?",
        );
        check(
            r#"{"ipam":{"ranges":[[{"subnet":"10.1.0.0/24"}],[{"subnet":"10.1.0.0/25"}]]}}"#,
            "ipam.ranges 10.1.0.0/24 and 10.1.0.0/25 overlap",
        );
        check(
            r#"{"ipam":{"subnet":"10.1.0.0/24","routes":[{"dst":"all"}]}}"#,
            r#"ipam.routes[0].dst "all" is not a network"#,
        );
        check(r#"{"ipam":{"subnet":7}}"#, "ipam.subnet is 7, not a string");
        check(
            r#"{"ipam":{"subnet":"10.1.0.0/24","dataDir":"x"}}"#,
            r#"ipam.dataDir "x" is not an absolute path"#,
        );
    }
}
