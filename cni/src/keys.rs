//! Reading configurations by hand: each bad value names its key. Go's readers take `null` for
//! "not there", and so do these.

use std::net::IpAddr;

use ipnet::IpNet;
use linux::netlink::Mac;
use serde_json::{Map, Value};

use crate::types::{CniError, ErrorCode};

/// A configuration, or an object within it.
pub type Object = Map<String, Value>;

/// Code 7 about a key.
pub fn invalid(key: &str, problem: impl std::fmt::Display) -> CniError {
    CniError::new(ErrorCode::InvalidConfig, format!("{key} {problem}"))
}

/// Code 2 about a key that is understood and cannot be honoured.
pub fn unsupported(key: &str, problem: impl std::fmt::Display) -> CniError {
    CniError::new(ErrorCode::UnsupportedField, format!("{key} {problem}"))
}

/// Makes errors about keys of an inner object name the whole path.
pub fn within(path: &str) -> impl Fn(CniError) -> CniError {
    move |error| CniError {
        msg: format!("{path}.{}", error.msg),
        ..error
    }
}

/// The value at a path of keys; none when one of them is missing or `null`.
#[must_use]
pub fn at<'a>(object: &'a Object, path: &[&str]) -> Option<&'a Value> {
    let (first, rest) = path.split_first()?;
    let mut value = object.get(*first)?;
    for key in rest {
        value = value.get(key)?;
    }
    Some(value).filter(|value| !value.is_null())
}

fn present<'a>(object: &'a Object, key: &str) -> Option<&'a Value> {
    object.get(key).filter(|value| !value.is_null())
}

/// True or false, if it is there.
///
/// # Errors
/// Code 7 when it is something else.
pub fn flag(object: &Object, key: &str) -> Result<Option<bool>, CniError> {
    match present(object, key) {
        None => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(other) => Err(invalid(key, format!("is {other}, not true or false"))),
    }
}

/// A text, if it is there and not empty.
///
/// # Errors
/// Code 7 when it is something else.
pub fn text<'a>(object: &'a Object, key: &str) -> Result<Option<&'a str>, CniError> {
    match present(object, key) {
        None => Ok(None),
        Some(Value::String(text)) if text.is_empty() => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(invalid(key, format!("is {other}, not a string"))),
    }
}

/// A whole number within a range, if it is there.
///
/// # Errors
/// Code 7 when it is something else or outside.
pub fn number(
    object: &Object,
    key: &str,
    range: std::ops::RangeInclusive<u64>,
) -> Result<Option<u64>, CniError> {
    let Some(value) = present(object, key) else {
        return Ok(None);
    };
    let outside = || {
        let (low, high) = (range.start(), range.end());
        invalid(
            key,
            format!("is {value}, not a whole number from {low} to {high}"),
        )
    };
    value
        .as_u64()
        .filter(|number| range.contains(number))
        .map(Some)
        .ok_or_else(outside)
}

/// A list; empty when it is not there.
///
/// # Errors
/// Code 7 when it is something else.
pub fn list<'a>(object: &'a Object, key: &str) -> Result<&'a [Value], CniError> {
    match present(object, key) {
        None => Ok(&[]),
        Some(Value::Array(items)) => Ok(items),
        Some(other) => Err(invalid(key, format!("is {other}, not a list"))),
    }
}

/// A list of texts; empty when it is not there.
///
/// # Errors
/// Code 7 when it is something else.
pub fn texts(object: &Object, key: &str) -> Result<Vec<String>, CniError> {
    let text = |item: &Value| {
        let text = item.as_str().map(str::to_owned);
        text.ok_or_else(|| invalid(key, format!("holds {item}, which is no string")))
    };
    list(object, key)?.iter().map(text).collect()
}

/// A list of networks; empty when it is not there.
///
/// # Errors
/// Code 7 when it is something else.
pub fn networks(object: &Object, key: &str) -> Result<Vec<IpNet>, CniError> {
    let parse = |item: &Value| {
        let net: Option<IpNet> = item.as_str().and_then(|text| text.parse().ok());
        net.ok_or_else(|| invalid(key, format!("holds {item}, which is not a network")))
    };
    list(object, key)?.iter().map(parse).collect()
}

/// An address, if it is there and not empty.
///
/// # Errors
/// Code 7 when it is something else.
pub fn address(object: &Object, key: &str) -> Result<Option<IpAddr>, CniError> {
    let Some(text) = text(object, key)? else {
        return Ok(None);
    };
    let bad = |_| invalid(key, format!("{text:?} is not an address"));
    text.parse().map(Some).map_err(bad)
}

/// An object, if it is there.
///
/// # Errors
/// Code 7 when it is something else.
pub fn object<'a>(object: &'a Object, key: &str) -> Result<Option<&'a Object>, CniError> {
    match present(object, key) {
        None => Ok(None),
        Some(Value::Object(inner)) => Ok(Some(inner)),
        Some(other) => Err(invalid(key, format!("is {other}, not an object"))),
    }
}

/// Transmission unit in bytes; 0 means "the kernel's own". The least an IPv4 link may have is 68;
/// a veth takes up to 65535.
///
/// # Errors
/// Code 7 when it is something else.
pub fn mtu(object: &Object) -> Result<Option<u32>, CniError> {
    match present(object, "mtu") {
        None => Ok(None),
        Some(value) => match value.as_u64() {
            Some(0) => Ok(None),
            Some(mtu @ 68..=65_535) => Ok(Some(mtu as u32)),
            _ => Err(invalid(
                "mtu",
                format!("is {value}, not a number from 68 to 65535"),
            )),
        },
    }
}

/// The hardware address asked for: by the runtime, else by `args`, else by `MAC` of `CNI_ARGS`
/// (given along), else by the configuration.
///
/// # Errors
/// Code 7 naming where a bad one came from.
pub fn mac(object: &Object, arg: Option<&str>) -> Result<Option<Mac>, CniError> {
    let at = |path: &[&str]| at(object, path)?.as_str().filter(|text| !text.is_empty());
    let given = [
        ("runtimeConfig.mac", at(&["runtimeConfig", "mac"])),
        ("args.cni.mac", at(&["args", "cni", "mac"])),
        ("CNI_ARGS MAC", arg),
        ("mac", at(&["mac"])),
    ];
    let Some((field, text)) = given.into_iter().find_map(|(f, t)| Some((f, t?))) else {
        return Ok(None);
    };
    match text.parse::<Mac>() {
        // The lowest bit of the first octet marks group addresses.
        Ok(mac) if mac.0[0] & 1 == 0 => Ok(Some(mac)),
        Ok(_) => Err(invalid(field, format!("{text:?} is a group address"))),
        Err(error) => Err(invalid(field, error)),
    }
}
