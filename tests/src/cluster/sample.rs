//! The sample of `deploy/sample`, and the table a person sees at the end of `up`.

use super::Lab;
use crate::{paths, progress::Step};
use anyhow::{Context, Result};
use serde_json::Value;

/// Applies the sample and waits until it is rolled out.
///
/// # Errors
/// When it does not become available within two minutes.
pub fn ensure(lab: &Lab) -> Result<()> {
    let step = Step::begin("sample");
    let dir = paths::workspace()
        .join("deploy/sample")
        .display()
        .to_string();
    lab.kubectl.run(&["apply", "-f", &dir])?;
    lab.kubectl
        .run(&["rollout", "status", "deployment/hello", "--timeout=120s"])
        .context("wait for the sample")?;
    step.done("3 pods of deployment/hello");
    Ok(())
}

/// Nodes and pods as a table, and what to type next.
///
/// # Errors
/// When kubectl fails.
pub fn summary(lab: &Lab) -> Result<String> {
    let mut rows = vec![["NODE", "STATUS", "ADDRESS", "RUNTIME"].map(String::from)];
    let nodes = lab.kubectl.json(&["get", "nodes"])?;
    rows.extend(items(&nodes).iter().map(|node| {
        [
            text(node, "/metadata/name"),
            ready(node),
            text(node, "/status/addresses/0/address"),
            text(node, "/status/nodeInfo/containerRuntimeVersion"),
        ]
    }));
    let mut out = table(&rows);
    let pods = lab.kubectl.json(&["get", "pods", "--all-namespaces"])?;
    if !items(&pods).is_empty() {
        let mut rows = vec![["POD", "STATUS", "ADDRESS", "NODE"].map(String::from)];
        rows.extend(items(&pods).iter().map(|pod| {
            let name = text(pod, "/metadata/name");
            [
                format!("{}/{name}", text(pod, "/metadata/namespace")),
                text(pod, "/status/phase"),
                text(pod, "/status/podIP"),
                text(pod, "/spec/nodeName"),
            ]
        }));
        out.push('\n');
        out.push_str(&table(&rows));
    }
    let lab_flag = match lab.layout.name.as_str() {
        super::DEFAULT_LAB => String::new(),
        name => format!(" --lab {name}"),
    };
    // Only what works: a lab may be up without the sample.
    let sample = items(&pods)
        .iter()
        .any(|pod| text(pod, "/metadata/labels/app") == "hello");
    let hints = if sample {
        format!(
            "  cargo xtask kubectl{lab_flag} logs -f deployment/hello
  cargo xtask kubectl{lab_flag} exec -it deployment/hello -- sh
"
        )
    } else {
        String::new()
    };
    out.push_str(&format!(
        "
next:
  cargo xtask kubectl{lab_flag} get pods -o wide
{hints}  export KUBECONFIG={}
  cargo xtask down{lab_flag}
logs: {}
",
        lab.layout.admin_kubeconfig().display(),
        lab.layout.dir.join("logs").display(),
    ));
    Ok(out)
}

fn items(list: &Value) -> &[Value] {
    list["items"].as_array().map_or(&[], Vec::as_slice)
}

fn text(object: &Value, pointer: &str) -> String {
    object
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or("-")
        .to_owned()
}

fn ready(node: &Value) -> String {
    let conditions = node.pointer("/status/conditions").and_then(Value::as_array);
    let ready = conditions
        .into_iter()
        .flatten()
        .find(|condition| condition["type"] == "Ready");
    match ready {
        Some(condition) if condition["status"] == "True" => "Ready".into(),
        _ => "NotReady".into(),
    }
}

/// Columns padded to their widest cell.
fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let widths: [usize; N] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0));
    let mut out = String::new();
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        out.push_str(cells.join("  ").trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["a", "bb"], ["ccc", "d"]].map(|row| row.map(String::from));
        assert_eq!(table(&rows), "a    bb\nccc  d\n");
    }
}
