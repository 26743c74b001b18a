//! Decisions: what a request means, given what is there. No IO, no clock.

use crate::error::DriverError;
use crate::model::{Access, Capability, CapacityRange, Filesystem, Kind, Mode, Provision, Source};
use crate::parameters::{ClassParameters, Form, Map};
use crate::store::{Record, VolumeRecord};

/// Sizes are multiples of this: a page, and a block of every filesystem here.
pub const GRAIN_BYTES: u64 = 4096;

/// What a volume gets when nobody says how large it shall be.
pub const DEFAULT_BYTES: u64 = 1 << 30;

/// The largest volume: the limit of ext4 with 4 KiB blocks on the way here (16 TiB less one).
pub const MAX_BYTES: u64 = (16 << 40) - GRAIN_BYTES;

/// What a volume is, from its class and how it will be used.
///
/// # Errors
/// [`DriverError::Invalid`] when both contradict each other or no local volume can do it.
pub fn choose_kind(
    class: &ClassParameters,
    capabilities: &[Capability],
    default: Filesystem,
) -> Result<Kind, DriverError> {
    let Some(first) = capabilities.first() else {
        return Err(DriverError::invalid("volume capabilities are missing"));
    };
    let kind = kind_of(class, &first.access, default)?;
    for capability in capabilities {
        unsupported(capability, kind).map_or(Ok(()), |what| Err(DriverError::invalid(what)))?;
    }
    Ok(kind)
}

fn kind_of(
    class: &ClassParameters,
    access: &Access,
    default: Filesystem,
) -> Result<Kind, DriverError> {
    match (class.form, access) {
        (Form::Directory, Access::Block) => Err(DriverError::invalid(
            "a volume of type dir cannot be a block device",
        )),
        (Form::Directory, Access::Mount { .. }) => Ok(Kind::Directory),
        (Form::Image, Access::Block) => Ok(Kind::Block),
        (Form::Image, Access::Mount { fstype, .. }) => {
            let wanted = Some(fstype.as_str()).filter(|fstype| !fstype.is_empty());
            let Some(wanted) = wanted.or(class.fstype.as_deref()) else {
                return Ok(Kind::Filesystem(default));
            };
            let filesystem = Filesystem::named(wanted).ok_or_else(|| {
                DriverError::invalid(format!("filesystem {wanted:?} is not known: ext4, xfs"))
            })?;
            Ok(Kind::Filesystem(filesystem))
        }
    }
}

/// Why a volume of this kind cannot be used so; none when it can.
#[must_use]
pub fn unsupported(capability: &Capability, kind: Kind) -> Option<String> {
    if capability.mode == Mode::MultiNode {
        return Some("a local volume is on one node only".to_owned());
    }
    match (&capability.access, kind) {
        (Access::Block, Kind::Block) | (Access::Mount { .. }, Kind::Directory) => None,
        (Access::Mount { fstype, .. }, Kind::Filesystem(filesystem)) => {
            let fits = fstype.is_empty() || fstype == filesystem.name();
            (!fits).then(|| format!("the volume has {}, not {fstype}", filesystem.name()))
        }
        (Access::Block, Kind::Directory | Kind::Filesystem(_)) => {
            Some("the volume has a filesystem and cannot be a block device".to_owned())
        }
        (Access::Mount { .. }, Kind::Block) => {
            Some("the volume is a block device and cannot be mounted".to_owned())
        }
    }
}

/// The size of a new volume: the smallest that is allowed, at least `smallest`.
///
/// # Errors
/// [`DriverError::OutOfRange`].
pub fn choose_size(range: CapacityRange, smallest: u64) -> Result<u64, DriverError> {
    let out = |what: String| Err(DriverError::OutOfRange { what });
    if let Some(limit) = range.limit
        && limit < range.required
    {
        let required = range.required;
        return out(format!(
            "at least {required} and at most {limit} bytes contradict each other"
        ));
    }
    let wanted = match range.required {
        0 => DEFAULT_BYTES.min(range.limit.unwrap_or(u64::MAX)) / GRAIN_BYTES * GRAIN_BYTES,
        required => required,
    };
    let Some(bytes) = wanted.max(smallest).checked_next_multiple_of(GRAIN_BYTES) else {
        return out(format!("{wanted} bytes are more than any volume has"));
    };
    if bytes > MAX_BYTES {
        return out(format!("{bytes} bytes are more than {MAX_BYTES}"));
    }
    match range.limit {
        Some(limit) if bytes > limit => out(format!(
            "the smallest possible size is {bytes} bytes, over the limit of {limit}"
        )),
        Some(_) | None => Ok(bytes),
    }
}

/// How an existing volume differs from what is asked for under its name; none when it is the
/// same.
#[must_use]
pub fn difference(
    record: &VolumeRecord,
    kind: Kind,
    range: CapacityRange,
    parameters: &Map,
    source: Option<&Source>,
) -> Option<String> {
    if record.kind != kind {
        return Some(format!("as {} and not {}", record.kind.name(), kind.name()));
    }
    if record.source.as_ref() != source {
        return Some("with another source".to_owned());
    }
    if &record.parameters != parameters {
        return Some("with other parameters".to_owned());
    }
    let size = record.capacity_bytes;
    let over = range.limit.is_some_and(|limit| size > limit);
    // Larger without a limit is another volume too: a grown one keeps its name, but nobody asks
    // for a volume of its old size under it.
    let wanted = choose_size(range, kind.min_bytes()).unwrap_or(0);
    let other = range.required != 0 && range.limit.is_none() && size != wanted;
    if size < range.required || over || other {
        return Some(format!("with {size} bytes"));
    }
    None
}

/// What is true of the pool at one moment, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Room {
    /// Size of the pool's filesystem.
    pub total: u64,
    /// What it has left.
    pub free: u64,
    /// Kept back for the filesystem itself and for people.
    pub reserve: u64,
    /// What volumes were promised and have no blocks for yet.
    pub debt: u64,
    /// Sizes of thin volumes together.
    pub thin: u64,
    /// How many per cent of the pool thin volumes may be promised together.
    pub overcommit_percent: u64,
}

impl Room {
    /// What can be promised, in bytes.
    #[must_use]
    pub fn available(&self, provision: Provision) -> u64 {
        let thick = self
            .free
            .saturating_sub(self.reserve)
            .saturating_sub(self.debt);
        match provision {
            Provision::Thick => thick,
            // A pool that has run low takes no more promises of either sort.
            Provision::Thin if thick == 0 => 0,
            Provision::Thin => {
                let most = u128::from(self.total) * u128::from(self.overcommit_percent) / 100;
                let most = u64::try_from(most).unwrap_or(u64::MAX);
                most.saturating_sub(self.thin)
            }
        }
    }

    /// Whether what thin volumes write may soon find no blocks.
    #[must_use]
    pub fn is_low(&self) -> bool {
        self.available(Provision::Thick) == 0
    }
}

/// One page of a list.
#[derive(Debug, PartialEq, Eq)]
pub struct Page<R> {
    /// What is on it.
    pub entries: Vec<R>,
    /// Where the next one begins; none when this is the last.
    pub next: Option<String>,
}

/// Cuts a page out of a list in order of creation. A token names the last entry of the page
/// before, so that what is removed or added in between moves nothing.
///
/// # Errors
/// [`DriverError::BadToken`].
pub fn page<R: Record>(all: Vec<R>, most: usize, token: &str) -> Result<Page<R>, DriverError> {
    let mut rest = all;
    if !token.is_empty() {
        let after = token
            .strip_prefix("after-")
            .and_then(|n| n.parse::<u64>().ok());
        let Some(after) = after else {
            return Err(DriverError::BadToken {
                token: token.chars().take(64).collect(),
            });
        };
        rest.retain(|record| record.sequence() > after);
    }
    let mut next = None;
    if most != 0 && rest.len() > most {
        rest.truncate(most);
        next = rest.last().map(|last| format!("after-{}", last.sequence()));
    }
    Ok(Page {
        entries: rest,
        next,
    })
}

/// Whether a volume made on this node satisfies the places that were asked for: any of them is
/// enough, none means no wish.
#[must_use]
pub fn is_reachable(places: &[Map], key: &str, node: &str) -> bool {
    let here = |place: &Map| place.iter().all(|(k, v)| k == key && v == node);
    places.is_empty() || places.iter().any(here)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{NodeTag, VolumeId};
    use crate::parameters::{self, Mutable};
    use crate::store::State;

    fn range(required: u64, limit: Option<u64>) -> CapacityRange {
        CapacityRange { required, limit }
    }

    fn mount(fstype: &str) -> Capability {
        Capability {
            access: Access::Mount {
                fstype: fstype.into(),
                options: Vec::new(),
                group: None,
            },
            mode: Mode::SingleNodeWriter,
        }
    }

    fn volume(sequence: u64) -> VolumeRecord {
        VolumeRecord {
            id: VolumeId::of(&sequence.to_string(), &NodeTag::of("d", "n")),
            name: sequence.to_string(),
            state: State::Ready,
            kind: Kind::Block,
            provision: Provision::Thick,
            capacity_bytes: 1 << 30,
            source: None,
            parameters: Map::new(),
            mutable: Mutable::default(),
            filesystem_uuid: None,
            shares_blocks: false,
            reserved_bytes: 0,
            sequence,
        }
    }

    #[test]
    fn the_smallest_allowed_size_is_taken() {
        let size = |required, limit| choose_size(range(required, limit), 1 << 20).ok();
        assert_eq!(size(0, None), Some(DEFAULT_BYTES));
        assert_eq!(size(0, Some(5 << 20)), Some(5 << 20));
        assert_eq!(size(1, None), Some(1 << 20));
        assert_eq!(size((1 << 20) + 1, None), Some((1 << 20) + 4096));
        assert_eq!(size((1 << 20) + 1, Some((1 << 20) + 2)), None);
        assert_eq!(size(2 << 20, Some(1 << 20)), None);
        assert_eq!(size(u64::MAX, None), None);
        assert_eq!(size(0, Some(1)), None);
    }

    #[test]
    fn class_and_use_decide_what_a_volume_is() {
        let plain = parameters::class(&Map::new()).unwrap();
        let kind = |capability| choose_kind(&plain, &[capability], Filesystem::Ext4);
        assert_eq!(kind(mount("")).unwrap(), Kind::Filesystem(Filesystem::Ext4));
        assert_eq!(
            kind(mount("xfs")).unwrap(),
            Kind::Filesystem(Filesystem::Xfs)
        );
        assert!(kind(mount("ntfs")).is_err());
        let mut many = mount("");
        many.mode = Mode::MultiNode;
        assert!(kind(many).is_err());
        assert!(choose_kind(&plain, &[], Filesystem::Ext4).is_err());
    }

    #[test]
    fn the_same_request_again_is_no_conflict_and_another_one_is() {
        let record = volume(1);
        let differs = |kind, range, source: Option<&Source>| {
            difference(&record, kind, range, &Map::new(), source).is_some()
        };
        assert!(!differs(Kind::Block, range(1 << 30, None), None));
        assert!(!differs(Kind::Block, range(1 << 20, Some(2 << 30)), None));
        assert!(differs(Kind::Block, range(2 << 30, None), None));
        assert!(differs(Kind::Block, range(1 << 20, None), None));
        assert!(differs(Kind::Block, range(0, Some(1 << 20)), None));
        assert!(differs(Kind::Directory, range(1 << 30, None), None));
        let source = Source::Volume(record.id.clone());
        assert!(differs(Kind::Block, range(1 << 30, None), Some(&source)));
    }

    #[test]
    fn what_is_promised_is_not_promised_again() {
        let room = Room {
            total: 100,
            free: 60,
            reserve: 10,
            debt: 20,
            thin: 150,
            overcommit_percent: 200,
        };
        assert_eq!(room.available(Provision::Thick), 30);
        assert_eq!(room.available(Provision::Thin), 50);
        let low = Room { free: 30, ..room };
        assert!(low.is_low());
        assert_eq!(low.available(Provision::Thin), 0);
    }

    #[test]
    fn pages_stay_right_when_entries_go_and_come_in_between() {
        let all: Vec<_> = (1..=5).map(volume).collect();
        let first = page(all.clone(), 2, "").unwrap();
        assert_eq!(first.entries.len(), 2);
        // The whole first page is deleted, and a sixth volume made.
        let now: Vec<_> = (3..=6).map(volume).collect();
        let second = page(now, 0, first.next.as_deref().unwrap()).unwrap();
        let names: Vec<_> = second.entries.iter().map(|v| v.name.as_str()).collect();
        assert_eq!(names, ["3", "4", "5", "6"]);
        assert_eq!(second.next, None);
        assert!(page(all, 0, "invalid-token").is_err());
    }

    #[test]
    fn only_this_node_is_reachable() {
        let place = |key: &str, value: &str| Map::from([(key.to_owned(), value.to_owned())]);
        let reachable = |places: &[Map]| is_reachable(places, "d/node", "a");
        assert!(reachable(&[]));
        assert!(reachable(&[place("d/node", "b"), place("d/node", "a")]));
        assert!(!reachable(&[place("d/node", "b")]));
        assert!(!reachable(&[place("zone", "a")]));
    }

    proptest::proptest! {
        #[test]
        fn a_size_is_never_outside_what_was_asked_for(required: u64, limit: Option<u64>) {
            if let Ok(bytes) = choose_size(range(required, limit), 1 << 20) {
                assert!(bytes >= required && bytes <= limit.unwrap_or(u64::MAX));
                assert_eq!(bytes % GRAIN_BYTES, 0);
            }
        }

        #[test]
        fn any_token_is_read_without_a_crash(token: String) {
            let _ = page(vec![volume(1)], 1, &token);
        }
    }
}
