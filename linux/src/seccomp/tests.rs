//! The compiler is checked against a small interpreter of classic BPF and, at the end, against
//! the kernel itself.

use super::super::profile::Profile;
use super::*;

/// What the kernel would answer for this call.
fn run(program: &Program, arch: u32, nr: u32, args: [u64; 6]) -> u32 {
    let mut data = Vec::new();
    data.extend_from_slice(&nr.to_le_bytes());
    data.extend_from_slice(&arch.to_le_bytes());
    data.extend_from_slice(&0u64.to_le_bytes());
    for a in args {
        data.extend_from_slice(&a.to_le_bytes());
    }
    let (mut pc, mut acc) = (0usize, 0u32);
    loop {
        let i = program.insns[pc];
        pc += 1;
        match i.code {
            LD_W_ABS => {
                let at = i.k as usize;
                acc = u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
            }
            ALU_AND_K => acc &= i.k,
            JA => pc += i.k as usize,
            JEQ_K => pc += usize::from(if acc == i.k { i.jt } else { i.jf }),
            JGT_K => pc += usize::from(if acc > i.k { i.jt } else { i.jf }),
            JGE_K => pc += usize::from(if acc >= i.k { i.jt } else { i.jf }),
            RET_K => return i.k,
            other => panic!("unknown instruction {other:#x}"),
        }
    }
}

fn nr(name: &str) -> u32 {
    name.parse::<syscalls::x86_64::Sysno>().unwrap().id() as u32
}

fn native(program: &Program, name: &str, args: [u64; 6]) -> u32 {
    run(program, AUDIT_ARCH_X86_64, nr(name), args)
}

const EPERM: u32 = RET_ERRNO | 1;

#[test]
fn the_default_profile_allows_everyday_calls_and_refuses_the_dangerous_ones() {
    let p = super::super::default_profile_program(&[]).unwrap();
    for name in [
        "read",
        "openat",
        "execve",
        "futex",
        "clone3",
        "mmap",
        "epoll_wait",
        "socket",
    ] {
        let expected = if name == "clone3" {
            RET_ERRNO | 38
        } else {
            RET_ALLOW
        };
        assert_eq!(native(&p, name, [2, 0, 0, 0, 0, 0]), expected, "{name}");
    }
    for name in [
        "mount",
        "reboot",
        "kexec_load",
        "bpf",
        "init_module",
        "setns",
        "unshare",
    ] {
        assert_eq!(native(&p, name, [0; 6]), EPERM, "{name}");
    }
    assert_eq!(native(&p, "clone", [0x1200011, 0, 0, 0, 0, 0]), RET_ALLOW);
    assert_eq!(
        native(&p, "clone", [0x1000_0000, 0, 0, 0, 0, 0]),
        EPERM,
        "CLONE_NEWUSER"
    );
    assert_eq!(native(&p, "socket", [40, 1, 0, 0, 0, 0]), EPERM, "AF_VSOCK");
    assert_eq!(
        native(&p, "personality", [0xffff_ffff, 0, 0, 0, 0, 0]),
        RET_ALLOW
    );
    assert_eq!(native(&p, "personality", [0x40000, 0, 0, 0, 0, 0]), EPERM);
}

#[test]
fn a_capability_opens_the_calls_it_guards() {
    let admin = super::super::default_profile_program(&[21]).unwrap();
    assert_eq!(native(&admin, "mount", [0; 6]), RET_ALLOW);
    assert_eq!(
        native(&admin, "clone", [0x1000_0000, 0, 0, 0, 0, 0]),
        RET_ALLOW
    );
    assert_eq!(native(&admin, "clone3", [0; 6]), RET_ALLOW);
    assert_eq!(native(&admin, "reboot", [0; 6]), EPERM);
}

#[test]
fn foreign_architectures_and_x32_never_slip_through() {
    let p = super::super::default_profile_program(&[]).unwrap();
    assert_eq!(run(&p, 0xC000_00B7, 0, [0; 6]), RET_KILL_PROCESS, "aarch64");
    assert_eq!(
        run(&p, AUDIT_ARCH_X86_64, X32_BIT, [0; 6]),
        EPERM,
        "x32 read"
    );
    // i386: 3 is read, 21 is mount.
    assert_eq!(run(&p, AUDIT_ARCH_I386, 3, [0; 6]), RET_ALLOW);
    assert_eq!(run(&p, AUDIT_ARCH_I386, 21, [0; 6]), EPERM);
}

/// A profile with one condition on the first argument of `close`.
fn conditional(op: &str, value: u64, two: u64) -> Program {
    let json = format!(
        r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{{"names":["close"],"action":"SCMP_ACT_ALLOW",
        "args":[{{"index":0,"value":{value},"valueTwo":{two},"op":"{op}"}}]}}]}}"#
    );
    super::super::compile_json(json.as_bytes(), &[]).unwrap()
}

proptest::proptest! {
    #[test]
    fn argument_tests_agree_with_arithmetic(a: u64, v: u64, two: u64, equal: bool) {
        let a = if equal { v } else { a };
        let cases = [
            ("SCMP_CMP_NE", a != v), ("SCMP_CMP_LT", a < v), ("SCMP_CMP_LE", a <= v),
            ("SCMP_CMP_EQ", a == v), ("SCMP_CMP_GE", a >= v), ("SCMP_CMP_GT", a > v),
            ("SCMP_CMP_MASKED_EQ", a & v == two),
        ];
        for (op, holds) in cases {
            let p = conditional(op, v, two);
            let expected = if holds { RET_ALLOW } else { EPERM };
            proptest::prop_assert_eq!(native(&p, "close", [a, 0, 0, 0, 0, 0]), expected, "{}", op);
        }
        let p = conditional("SCMP_CMP_MASKED_EQ", v, a & v);
        proptest::prop_assert_eq!(native(&p, "close", [a, 0, 0, 0, 0, 0]), RET_ALLOW);
    }

    #[test]
    fn every_number_gets_what_a_linear_list_would_give(nr in 0u32..1024) {
        let profile = super::super::default_profile::profile(&[]);
        let p = compile(&profile, &[]).unwrap();
        let named = profile.syscalls.iter().filter(|r| counts(r, &[]) && r.args.is_empty()
            && r.action == "SCMP_ACT_ALLOW").flat_map(|r| r.names.iter())
            .any(|n| n.parse::<syscalls::x86_64::Sysno>().is_ok_and(|s| s.id() as u32 == nr));
        if named {
            proptest::prop_assert_eq!(run(&p, AUDIT_ARCH_X86_64, nr, [0; 6]), RET_ALLOW);
        }
    }

    #[test]
    fn no_bytes_make_the_parser_panic(bytes: Vec<u8>) {
        let _ = super::super::compile_json(&bytes, &[]);
    }
}

#[test]
fn a_wrong_profile_names_what_is_wrong() {
    let wrong = |json: &str| {
        super::super::compile_json(json.as_bytes(), &[])
            .unwrap_err()
            .to_string()
    };
    assert!(wrong("{").contains("malformed"));
    assert!(wrong(r#"{"defaultAction":"ALLOW"}"#).contains("defaultAction is \"ALLOW\""));
    let bad = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],"action":"SCMP_ACT_LOG","args":[{"index":9,"value":0,"op":"SCMP_CMP_EQ"}]}]}"#;
    assert!(wrong(bad).contains("syscalls[0].args: index is 9"));
}

#[test]
fn unknown_names_are_skipped_as_other_runtimes_do() {
    let json = br#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["no_such_call","read"],"action":"SCMP_ACT_ERRNO","errnoRet":5}]}"#;
    let p = super::super::compile_json(json, &[]).unwrap();
    assert_eq!(native(&p, "read", [0; 6]), RET_ERRNO | 5);
    assert_eq!(native(&p, "write", [0; 6]), RET_ALLOW);
}

#[test]
fn the_programs_stay_small() {
    let p = super::super::default_profile_program(&[]).unwrap();
    assert!(p.len() < 2000, "{} instructions", p.len());
    assert!(Profile::from_json(&vec![b' '; 2 << 20]).is_err());
}
