//! A strict reader of the text format, for tests of what we write: it refuses what a scraper
//! would refuse.

use std::collections::{BTreeMap, HashMap, HashSet};

/// One line with a value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sample {
    /// Name with its suffix.
    pub(crate) name: String,
    /// Labels.
    pub(crate) labels: BTreeMap<String, String>,
    /// Value.
    pub(crate) value: f64,
    /// Time of the sample.
    pub(crate) at_ms: Option<i64>,
}

/// A page that was read.
#[derive(Debug, Default)]
pub(crate) struct Parsed {
    /// Family to type.
    pub(crate) types: HashMap<String, String>,
    /// All samples.
    pub(crate) samples: Vec<Sample>,
}

impl Parsed {
    /// The samples of one name.
    pub(crate) fn named(&self, name: &str) -> Vec<&Sample> {
        self.samples.iter().filter(|s| s.name == name).collect()
    }
}

/// Reads a page; says what is wrong with it.
pub(crate) fn parse(text: &str) -> Result<Parsed, String> {
    let mut parsed = Parsed::default();
    let mut seen = HashSet::new();
    let mut family = String::new();
    for line in text.split('\n').filter(|l| !l.is_empty()) {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, _) = rest.split_once(' ').ok_or(format!("no help: {line}"))?;
            name.clone_into(&mut family);
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').ok_or(format!("no type: {line}"))?;
            if name != family {
                return Err(format!("type of {name} within {family}"));
            }
            if parsed
                .types
                .insert(name.to_owned(), kind.to_owned())
                .is_some()
            {
                return Err(format!("{name} appears twice"));
            }
        } else {
            let sample = sample(line)?;
            let base = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|s| sample.name.strip_suffix(s).filter(|b| *b == family));
            if base.unwrap_or(&sample.name) != family {
                return Err(format!("{} within {family}", sample.name));
            }
            if !seen.insert((sample.name.clone(), sample.labels.clone())) {
                return Err(format!("the same series twice: {line}"));
            }
            parsed.samples.push(sample);
        }
    }
    Ok(parsed)
}

fn is_name(text: &str) -> bool {
    let first = |c: char| c.is_ascii_alphabetic() || c == '_' || c == ':';
    text.starts_with(first) && text.chars().all(|c| first(c) || c.is_ascii_digit())
}

fn sample(line: &str) -> Result<Sample, String> {
    let bad = |what: &str| format!("{what}: {line}");
    let end = line.find(['{', ' ']).ok_or(bad("no value"))?;
    let (name, mut rest) = line.split_at(end);
    if !is_name(name) {
        return Err(bad("bad name"));
    }
    let mut labels = BTreeMap::new();
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner;
        while !rest.starts_with('}') {
            let (label, after) = rest.split_once("=\"").ok_or(bad("bad label"))?;
            let (value, after) = quoted(after).ok_or(bad("bad label value"))?;
            if !is_name(label) || labels.insert(label.to_owned(), value).is_some() {
                return Err(bad("bad label name"));
            }
            rest = after.strip_prefix(',').unwrap_or(after);
        }
        rest = &rest[1..];
    }
    let mut words = rest.split(' ').filter(|w| !w.is_empty());
    let value = words.next().ok_or(bad("no value"))?;
    let value = value.parse().map_err(|_| bad("bad value"))?;
    let at_ms = words.next().map(|w| w.parse().map_err(|_| bad("bad time")));
    Ok(Sample {
        name: name.to_owned(),
        labels,
        value,
        at_ms: at_ms.transpose()?,
    })
}

/// Text up to an unescaped quote, and what follows it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    loop {
        match chars.next()? {
            (at, '"') => return Some((value, &text[at + 1..])),
            (_, '\\') => match chars.next()?.1 {
                'n' => value.push('\n'),
                c @ ('\\' | '"') => value.push(c),
                _ => return None,
            },
            (_, c) => value.push(c),
        }
    }
}
