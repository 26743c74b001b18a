//! Which devices a cgroup may use: an allow list, as v1 lines or as a v2 eBPF program
//! (`BPF_PROG_TYPE_CGROUP_DEVICE`, kernel: `admin-guide/cgroup-v2`, "Device controller").

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

/// Block or character.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// Both, of any number and with all access: everything is allowed.
    All,
    /// Character devices.
    Char,
    /// Block devices.
    Block,
}

/// What may be done with a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceAccess {
    /// Read.
    pub read: bool,
    /// Write.
    pub write: bool,
    /// Make a node for it.
    pub mknod: bool,
}

impl DeviceAccess {
    /// All three.
    pub const ALL: Self = Self {
        read: true,
        write: true,
        mknod: true,
    };
    /// Making nodes only.
    pub const MKNOD: Self = Self {
        read: false,
        write: false,
        mknod: true,
    };

    /// From letters (`rwm`); others are ignored.
    #[must_use]
    pub fn from_letters(letters: &str) -> Self {
        Self {
            read: letters.contains('r'),
            write: letters.contains('w'),
            mknod: letters.contains('m'),
        }
    }

    fn letters(self) -> String {
        let all = [(self.read, 'r'), (self.write, 'w'), (self.mknod, 'm')];
        all.iter().filter(|(on, _)| *on).map(|(_, c)| *c).collect()
    }

    /// `BPF_DEVCG_ACC_*`.
    fn bits(self) -> i32 {
        i32::from(self.mknod) | i32::from(self.read) << 1 | i32::from(self.write) << 2
    }
}

/// One allowed set of devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceRule {
    /// Kind.
    pub kind: DeviceKind,
    /// Major number, any when none.
    pub major: Option<u32>,
    /// Minor number, any when none.
    pub minor: Option<u32>,
    /// Access.
    pub access: DeviceAccess,
}

impl DeviceRule {
    /// Everything, for privileged containers.
    pub const EVERYTHING: Self = Self {
        kind: DeviceKind::All,
        major: None,
        minor: None,
        access: DeviceAccess::ALL,
    };

    /// A character device.
    #[must_use]
    pub fn char(major: u32, minor: Option<u32>) -> Self {
        Self {
            kind: DeviceKind::Char,
            major: Some(major),
            minor,
            access: DeviceAccess::ALL,
        }
    }

    /// Whether it allows everything.
    #[must_use]
    pub fn is_everything(&self) -> bool {
        self.kind == DeviceKind::All
    }

    /// The line for `devices.allow`.
    pub(super) fn to_v1(&self) -> String {
        let number = |n: Option<u32>| n.map_or_else(|| "*".to_owned(), |n| n.to_string());
        let kind = match self.kind {
            DeviceKind::All => return "a".to_owned(),
            DeviceKind::Char => 'c',
            DeviceKind::Block => 'b',
        };
        let (major, minor) = (number(self.major), number(self.minor));
        format!("{kind} {major}:{minor} {}", self.access.letters())
    }
}

/// What every container may use: making any node (harmless without access), the standard
/// character devices, terminals.
#[must_use]
pub fn default_devices() -> Vec<DeviceRule> {
    let mknod = |kind| DeviceRule {
        kind,
        major: None,
        minor: None,
        access: DeviceAccess::MKNOD,
    };
    let mut rules = vec![mknod(DeviceKind::Char), mknod(DeviceKind::Block)];
    // null, zero, full, random, urandom, tty, ptmx
    let standard = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)];
    let standard = standard.iter().map(|(a, i)| DeviceRule::char(*a, Some(*i)));
    rules.extend(standard);
    // Pseudo terminals.
    rules.push(DeviceRule::char(136, None));
    rules
}

/// One eBPF instruction as the kernel reads it.
fn instruction(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> u64 {
    let [offset_low, offset_high] = offset.to_le_bytes();
    let [a, b, c, d] = immediate.to_le_bytes();
    u64::from_le_bytes([code, dst | src << 4, offset_low, offset_high, a, b, c, d])
}

const LOAD_WORD: u8 = 0x61;
const MOVE_REGISTER: u8 = 0xbc;
const MOVE_NUMBER: u8 = 0xb4;
const AND_NUMBER: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const JUMP_NOT_EQUAL: u8 = 0x55;
const EXIT: u8 = 0x95;

/// The filter for an allow list. Its context is `struct bpf_cgroup_dev_ctx`: access << 16 | type,
/// major, minor. Register 2 holds the type, 3 the access, 4 the major, 5 the minor.
pub(super) fn program(allowed: &[DeviceRule]) -> Vec<u64> {
    let mut out = vec![
        instruction(LOAD_WORD, 2, 1, 0, 0),
        instruction(MOVE_REGISTER, 3, 2, 0, 0),
        instruction(AND_NUMBER, 2, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, 3, 0, 0, 16),
        instruction(LOAD_WORD, 4, 1, 4, 0),
        instruction(LOAD_WORD, 5, 1, 8, 0),
    ];
    for rule in allowed {
        out.extend(rule_block(rule));
    }
    out.push(instruction(MOVE_NUMBER, 0, 0, 0, 0));
    out.push(instruction(EXIT, 0, 0, 0, 0));
    out
}

/// Tests of one rule; each failed one jumps behind the block.
fn rule_block(rule: &DeviceRule) -> Vec<u64> {
    // (register, value it must have), 0 standing for "access outside the rule".
    let mut tests: Vec<(u8, i32)> = Vec::new();
    match rule.kind {
        DeviceKind::All => {}
        DeviceKind::Block => tests.push((2, 1)),
        DeviceKind::Char => tests.push((2, 2)),
    }
    let number = |n: u32| i32::try_from(n).unwrap_or(i32::MAX);
    tests.extend(rule.major.map(|n| (4, number(n))));
    tests.extend(rule.minor.map(|n| (5, number(n))));
    let outside = 7 & !rule.access.bits();
    let mut block = Vec::new();
    if outside != 0 {
        block.push((MOVE_REGISTER, 1, 3, 0));
        block.push((AND_NUMBER, 1, 0, outside));
        block.push((JUMP_NOT_EQUAL, 1, 0, 0));
    }
    for (register, value) in tests {
        block.push((JUMP_NOT_EQUAL, register, 0, value));
    }
    block.push((MOVE_NUMBER, 0, 0, 1));
    block.push((EXIT, 0, 0, 0));
    let length = block.len();
    let place = |(index, (code, dst, src, number)): (usize, (u8, u8, u8, i32))| {
        let behind = i16::try_from(length - index - 1).unwrap_or(i16::MAX);
        let offset = if code == JUMP_NOT_EQUAL { behind } else { 0 };
        instruction(code, dst, src, offset, number)
    };
    block.into_iter().enumerate().map(place).collect()
}

/// `union bpf_attr` for `BPF_PROG_LOAD`, as far as needed.
#[repr(C)]
struct Load {
    program_type: u32,
    instructions: u32,
    code: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

/// `union bpf_attr` for `BPF_PROG_ATTACH`.
#[repr(C)]
struct Attach {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

const BPF_PROG_LOAD: i32 = 5;
const BPF_PROG_ATTACH: i32 = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

#[expect(unsafe_code, reason = "bpf(2) has no safe wrapper")]
fn bpf<T>(command: i32, attributes: &T) -> io::Result<i32> {
    // SAFETY: `attributes` is a live, fully initialised C struct and its true size is passed; the
    // kernel only reads it, and pointers in it outlive the call (see the callers).
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, attributes, std::mem::size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
}

/// Loads a device program and attaches it to a cgroup; the cgroup then holds it.
pub(super) fn attach(dir: &Path, program: &[u64]) -> io::Result<()> {
    let cgroup = std::fs::File::open(dir)?;
    let license = c"Apache-2.0";
    let load = Load {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instructions: u32::try_from(program.len())
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?,
        code: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
    };
    let raw = bpf(BPF_PROG_LOAD, &load)?;
    #[expect(unsafe_code, reason = "a descriptor made by a raw syscall")]
    // SAFETY: the kernel has just returned this descriptor, nobody else owns it.
    let loaded = unsafe { OwnedFd::from_raw_fd(raw) };
    let number = |fd: i32| u32::try_from(fd).unwrap_or(u32::MAX);
    let request = Attach {
        target: number(cgroup.as_raw_fd()),
        program: number(loaded.as_raw_fd()),
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    bpf(BPF_PROG_ATTACH, &request).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would.
    fn run(program: &[u64], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut r = [0u32; 11];
        let mut at = 0usize;
        loop {
            let b = program[at].to_le_bytes();
            let (dst, src) = (usize::from(b[1] & 15), usize::from(b[1] >> 4));
            let offset = i16::from_le_bytes([b[2], b[3]]);
            let number = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
            at += 1;
            match b[0] {
                LOAD_WORD => r[dst] = context[usize::try_from(offset).unwrap() / 4],
                MOVE_REGISTER => r[dst] = r[src],
                MOVE_NUMBER => r[dst] = number,
                AND_NUMBER => r[dst] &= number,
                SHIFT_RIGHT => r[dst] >>= number,
                JUMP_NOT_EQUAL if r[dst] != number => at += usize::try_from(offset).unwrap(),
                JUMP_NOT_EQUAL => {}
                EXIT => return r[0] == 1,
                other => panic!("unknown code {other:#x}"),
            }
        }
    }

    const CHAR: u32 = 2;
    const BLOCK: u32 = 1;
    const READ: u32 = 2;
    const MKNOD: u32 = 1;

    #[test]
    fn the_default_list_gives_null_and_terminals_but_no_disk() {
        let program = program(&default_devices());
        assert!(run(&program, CHAR, READ, 1, 3));
        assert!(run(&program, CHAR, READ, 136, 7));
        assert!(run(&program, BLOCK, MKNOD, 8, 0));
        assert!(!run(&program, BLOCK, READ, 8, 0));
        assert!(!run(&program, BLOCK, READ | MKNOD, 8, 0));
        assert!(!run(&program, CHAR, READ, 1, 1));
    }

    #[test]
    fn an_empty_list_allows_nothing() {
        assert!(!run(&program(&[]), CHAR, READ, 1, 3));
    }

    #[test]
    fn a_rule_is_written_as_the_kernel_reads_it() {
        assert_eq!(DeviceRule::char(136, None).to_v1(), "c 136:* rwm");
        assert_eq!(default_devices()[1].to_v1(), "b *:* m");
    }

    #[test]
    fn the_kernel_accepts_and_obeys_the_program() {
        let table = crate::mountinfo::read().unwrap();
        let Some(tree) = table.iter().find(|m| m.fstype == "cgroup2") else {
            println!("skipped: no cgroup2 tree is mounted");
            return;
        };
        let name = format!("ferrule-test-devices-{}", std::process::id());
        let dir = tree.mount_point.join(name);
        std::fs::create_dir(&dir).unwrap();
        let attached = attach(&dir, &program(&default_devices()));
        std::fs::remove_dir(&dir).unwrap();
        match attached {
            Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => println!("skipped: no bpf(2)"),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                println!("skipped: this kernel has no cgroup device programs");
            }
            outcome => outcome.unwrap(),
        }
    }
}
