//! Compiler from a [`Profile`] to classic BPF (`seccomp(2)`, kernel `userspace-api/seccomp_filter`).
//!
//! Shape of the program: check the architecture, then a binary search over ranges of system call
//! numbers with the same treatment, then (for calls with conditions) their argument tests. A
//! call costs about eight comparisons instead of the hundreds of a linear list, and the kernel's
//! per-call cache makes unconditional ones free.
//!
//! x32 calls (bit 30 set) get the default action: no distribution builds for it any more.

use super::profile::{Arg, Filter, Profile, Rule, SeccompError};
use std::collections::BTreeMap;

const AUDIT_ARCH_X86_64: u32 = 0xC000_003E;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;
const X32_BIT: u32 = 0x4000_0000;
const MAX_INSNS: usize = 4096;

// Offsets in `struct seccomp_data`.
const OFF_NR: u32 = 0;
const OFF_ARCH: u32 = 4;
const OFF_ARGS: u32 = 16;

// Return values of a filter.
const RET_KILL_PROCESS: u32 = 0x8000_0000;
const RET_KILL_THREAD: u32 = 0;
const RET_TRAP: u32 = 0x0003_0000;
const RET_ERRNO: u32 = 0x0005_0000;
const RET_TRACE: u32 = 0x7ff0_0000;
const RET_LOG: u32 = 0x7ffc_0000;
const RET_ALLOW: u32 = 0x7fff_0000;

// Instruction codes (`linux/bpf_common.h`).
const LD_W_ABS: u16 = 0x20;
const ALU_AND_K: u16 = 0x54;
const JA: u16 = 0x05;
const JEQ_K: u16 = 0x15;
const JGT_K: u16 = 0x25;
const JGE_K: u16 = 0x35;
const RET_K: u16 = 0x06;

/// A compiled filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    insns: Vec<Insn>,
}

/// One instruction, laid out as `struct sock_filter`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Insn {
    code: u16,
    jt: u8,
    jf: u8,
    k: u32,
}

impl Program {
    /// The program as the kernel reads it: an array of `struct sock_filter`, little endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.insns.len() * 8);
        for i in &self.insns {
            out.extend_from_slice(&i.code.to_le_bytes());
            out.push(i.jt);
            out.push(i.jf);
            out.extend_from_slice(&i.k.to_le_bytes());
        }
        out
    }

    /// Number of instructions.
    pub fn len(&self) -> usize {
        self.insns.len()
    }

    /// Whether it is empty (never for a compiled profile).
    pub fn is_empty(&self) -> bool {
        self.insns.is_empty()
    }
}

/// What happens to one system call number.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Treatment {
    /// Conditions with their result, tried in order.
    conditional: Vec<(Vec<Condition>, u32)>,
    /// Result when none holds.
    otherwise: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Condition {
    index: u32,
    op: Op,
    value: u64,
    value_two: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Op {
    Ne,
    Lt,
    Le,
    Eq,
    Ge,
    Gt,
    MaskedEq,
}

/// Compiles a profile for a process that holds `capabilities` (numbers).
///
/// # Errors
/// See [`SeccompError`].
pub fn compile(profile: &Profile, capabilities: &[u8]) -> Result<Program, SeccompError> {
    let default = action(
        "defaultAction",
        &profile.default_action,
        profile.default_errno_ret,
    )?;
    let mut rules = Vec::new();
    for (i, rule) in profile.syscalls.iter().enumerate() {
        if !counts(rule, capabilities) {
            continue;
        }
        let result = action(
            &format!("syscalls[{i}].action"),
            &rule.action,
            rule.errno_ret,
        )?;
        let conditions = rule
            .args
            .iter()
            .map(|a| condition(i, a))
            .collect::<Result<Vec<_>, _>>()?;
        rules.push((&rule.names, conditions, result));
    }
    let native = treatments(&rules, default, |name| {
        name.parse::<syscalls::x86_64::Sysno>()
            .ok()
            .map(|s| s.id() as u32)
    });
    let compat = profile.wants_x86().then(|| {
        treatments(&rules, default, |name| {
            name.parse::<syscalls::x86::Sysno>()
                .ok()
                .map(|s| s.id() as u32)
        })
    });
    let mut asm = Assembler::default();
    let (native_at, compat_at) = (asm.label(), asm.label());
    let foreign = asm.label();
    asm.load(OFF_ARCH);
    asm.branch(JEQ_K, AUDIT_ARCH_X86_64, native_at, compat_at);
    asm.place(compat_at);
    if let Some(table) = &compat {
        let here = asm.label();
        asm.branch(JEQ_K, AUDIT_ARCH_I386, here, foreign);
        asm.place(here);
        asm.load(OFF_NR);
        asm.search(&ranges(table, default), default);
    }
    asm.place(foreign);
    asm.ret(if compat.is_some() {
        RET_KILL_PROCESS
    } else {
        default
    });
    asm.place(native_at);
    asm.load(OFF_NR);
    let (x32, normal) = (asm.label(), asm.label());
    asm.branch(JGE_K, X32_BIT, x32, normal);
    asm.place(x32);
    asm.ret(default);
    asm.place(normal);
    asm.search(&ranges(&native, default), default);
    asm.finish()
}

/// The filter's return value for an action name.
fn action(field: &str, name: &str, errno: Option<u32>) -> Result<u32, SeccompError> {
    Ok(match name {
        "SCMP_ACT_ALLOW" => RET_ALLOW,
        "SCMP_ACT_ERRNO" => RET_ERRNO | (errno.unwrap_or(libc::EPERM as u32) & 0xffff),
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => RET_KILL_THREAD,
        "SCMP_ACT_KILL_PROCESS" => RET_KILL_PROCESS,
        "SCMP_ACT_TRAP" => RET_TRAP,
        "SCMP_ACT_TRACE" => RET_TRACE | (errno.unwrap_or(libc::EPERM as u32) & 0xffff),
        "SCMP_ACT_LOG" => RET_LOG,
        other => {
            return Err(SeccompError::Action {
                field: field.to_owned(),
                value: other.to_owned(),
            });
        }
    })
}

fn condition(rule: usize, arg: &Arg) -> Result<Condition, SeccompError> {
    if arg.index > 5 {
        return Err(SeccompError::ArgumentIndex {
            rule,
            index: arg.index,
        });
    }
    let op = match arg.op.as_str() {
        "SCMP_CMP_NE" => Op::Ne,
        "SCMP_CMP_LT" => Op::Lt,
        "SCMP_CMP_LE" => Op::Le,
        "SCMP_CMP_EQ" => Op::Eq,
        "SCMP_CMP_GE" => Op::Ge,
        "SCMP_CMP_GT" => Op::Gt,
        "SCMP_CMP_MASKED_EQ" => Op::MaskedEq,
        other => {
            return Err(SeccompError::Operator {
                rule,
                value: other.to_owned(),
            });
        }
    };
    Ok(Condition {
        index: arg.index,
        op,
        value: arg.value,
        value_two: arg.value_two,
    })
}

/// Whether a rule applies to a process with these capabilities on this architecture.
fn counts(rule: &Rule, capabilities: &[u8]) -> bool {
    let held = |name: &String| {
        crate::seccomp::default_profile::capability_number(name)
            .is_some_and(|n| capabilities.contains(&n))
    };
    let Filter { caps, arches } = &rule.includes;
    let included = caps.iter().all(held)
        && (arches.is_empty() || arches.iter().any(|a| a == "amd64" || a == "x86_64"));
    let excluded = rule.excludes.caps.iter().any(held)
        || rule
            .excludes
            .arches
            .iter()
            .any(|a| a == "amd64" || a == "x86_64");
    included && !excluded
}

/// What happens to each number that some rule names.
fn treatments(
    rules: &[(&Vec<String>, Vec<Condition>, u32)],
    default: u32,
    number: impl Fn(&str) -> Option<u32>,
) -> BTreeMap<u32, Treatment> {
    let mut table: BTreeMap<u32, Treatment> = BTreeMap::new();
    let mut unconditional = std::collections::BTreeSet::new();
    for (names, conditions, result) in rules {
        for nr in names.iter().filter_map(|n| number(n)) {
            let t = table.entry(nr).or_insert_with(|| Treatment {
                conditional: Vec::new(),
                otherwise: default,
            });
            if conditions.is_empty() {
                if unconditional.insert(nr) {
                    t.otherwise = *result;
                }
            } else {
                t.conditional.push((conditions.clone(), *result));
            }
        }
    }
    for t in table.values_mut() {
        let otherwise = t.otherwise;
        // A condition with the same result as "otherwise" decides nothing, unless another with
        // a different result follows it.
        if t.conditional.iter().all(|(_, r)| *r == otherwise) {
            t.conditional.clear();
        }
    }
    table
}

/// Consecutive numbers with the same unconditional result, covering 0..; `start` of each.
fn ranges(table: &BTreeMap<u32, Treatment>, default: u32) -> Vec<(u32, Treatment)> {
    let plain = Treatment {
        conditional: Vec::new(),
        otherwise: default,
    };
    let mut out: Vec<(u32, Treatment)> = vec![(0, plain.clone())];
    let mut next = 0;
    let mut push = |start: u32, t: &Treatment| {
        let (last_start, last) = out.last_mut().expect("never empty");
        if *last_start == start {
            *last = t.clone();
        } else if *last != *t {
            out.push((start, t.clone()));
        }
    };
    for (&nr, t) in table {
        if nr > next {
            push(next, &plain);
        }
        push(nr, t);
        next = nr + 1;
    }
    push(next, &plain);
    out.dedup_by(|b, a| a.1 == b.1);
    out
}

/// A jump target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Label(usize);

/// Emits instructions with labels. A conditional jump is three instructions (test, two long
/// jumps), so that distance never matters.
#[derive(Debug, Default)]
struct Assembler {
    insns: Vec<Insn>,
    targets: Vec<Option<usize>>,
    jumps: Vec<(usize, Label)>,
}

impl Assembler {
    fn label(&mut self) -> Label {
        self.targets.push(None);
        Label(self.targets.len() - 1)
    }

    fn place(&mut self, label: Label) {
        self.targets[label.0] = Some(self.insns.len());
    }

    fn emit(&mut self, code: u16, k: u32) {
        self.insns.push(Insn {
            code,
            jt: 0,
            jf: 0,
            k,
        });
    }

    fn load(&mut self, offset: u32) {
        self.emit(LD_W_ABS, offset);
    }

    fn ret(&mut self, value: u32) {
        self.emit(RET_K, value);
    }

    fn jump(&mut self, to: Label) {
        self.jumps.push((self.insns.len(), to));
        self.emit(JA, 0);
    }

    fn branch(&mut self, code: u16, k: u32, yes: Label, no: Label) {
        self.insns.push(Insn {
            code,
            jt: 0,
            jf: 1,
            k,
        });
        self.jump(yes);
        self.jump(no);
    }

    /// Binary search over ranges; the call number is in the accumulator.
    fn search(&mut self, ranges: &[(u32, Treatment)], default: u32) {
        match ranges {
            [] => self.ret(default),
            [(_, only)] => self.treat(only),
            _ => {
                let middle = ranges.len() / 2;
                let (upper, lower) = (self.label(), self.label());
                self.branch(JGE_K, ranges[middle].0, upper, lower);
                self.place(lower);
                self.search(&ranges[..middle], default);
                self.place(upper);
                self.search(&ranges[middle..], default);
            }
        }
    }

    fn treat(&mut self, treatment: &Treatment) {
        for (conditions, result) in &treatment.conditional {
            let miss = self.label();
            for condition in conditions {
                self.test(condition, miss);
            }
            self.ret(*result);
            self.place(miss);
        }
        self.ret(treatment.otherwise);
    }

    /// Falls through when the condition holds, else jumps to `miss`. Arguments are 64 bits wide
    /// and compared in two halves, the higher first.
    fn test(&mut self, condition: &Condition, miss: Label) {
        let low_at = OFF_ARGS + condition.index * 8;
        let high_at = low_at + 4;
        let (high, low) = ((condition.value >> 32) as u32, condition.value as u32);
        let hit = self.label();
        let low_test = self.label();
        match condition.op {
            Op::Eq | Op::Ne => {
                let (same, differ) = if condition.op == Op::Eq {
                    (hit, miss)
                } else {
                    (miss, hit)
                };
                self.load(high_at);
                self.branch(JEQ_K, high, low_test, differ);
                self.place(low_test);
                self.load(low_at);
                self.branch(JEQ_K, low, same, differ);
            }
            Op::MaskedEq => {
                let two = condition.value_two;
                self.load(high_at);
                self.emit(ALU_AND_K, high);
                self.branch(JEQ_K, (two >> 32) as u32, low_test, miss);
                self.place(low_test);
                self.load(low_at);
                self.emit(ALU_AND_K, low);
                self.branch(JEQ_K, two as u32, hit, miss);
            }
            Op::Gt | Op::Ge | Op::Lt | Op::Le => {
                // a > v and a >= v directly; a < v is not (a >= v), a <= v is not (a > v).
                let strict = matches!(condition.op, Op::Gt | Op::Le);
                let (yes, no) = if matches!(condition.op, Op::Gt | Op::Ge) {
                    (hit, miss)
                } else {
                    (miss, hit)
                };
                let high_equal = self.label();
                self.load(high_at);
                self.branch(JGT_K, high, yes, high_equal);
                self.place(high_equal);
                self.branch(JEQ_K, high, low_test, no);
                self.place(low_test);
                self.load(low_at);
                self.branch(if strict { JGT_K } else { JGE_K }, low, yes, no);
            }
        }
        self.place(hit);
    }

    fn finish(mut self) -> Result<Program, SeccompError> {
        for (at, label) in &self.jumps {
            let target = self.targets[label.0].unwrap_or(self.insns.len());
            self.insns[*at].k = (target - at - 1) as u32;
        }
        self.thread_jumps();
        if self.insns.len() > MAX_INSNS {
            return Err(SeccompError::TooLong(self.insns.len()));
        }
        Ok(Program { insns: self.insns })
    }

    /// Lets a test jump straight to its targets where they are near enough, so that the kernel
    /// does not execute the long jumps in between (they stay as dead code; its verifier allows
    /// that).
    fn thread_jumps(&mut self) {
        for at in 0..self.insns.len() {
            let insn = self.insns[at];
            if !matches!(insn.code, JEQ_K | JGT_K | JGE_K) {
                continue;
            }
            let distance = |from: usize| 1 + from + self.insns[at + 1 + from].k as usize;
            let (yes, no) = (distance(0), distance(1));
            if let (Ok(jt), Ok(jf)) = (u8::try_from(yes), u8::try_from(no)) {
                self.insns[at].jt = jt;
                self.insns[at].jf = jf;
            }
        }
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
