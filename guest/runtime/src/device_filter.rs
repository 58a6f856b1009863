//! Device rules as a BPF program for cgroup v2, where the kernel has no `devices` controller.
//!
//! The rules mean what they mean in the v1 controller: later ones win, bit by bit (read, write, mknod), and what no rule
//! decides is refused. So the program walks them from the last to the first and forgets the bits a rule has granted;
//! when none are left the access is allowed, and a matching refusal of a bit still asked for ends it.
//!
//! Instruction encoding: kernel documentation, `bpf/standardization/instruction-set`. Context: `struct
//! bpf_cgroup_dev_ctx` of `linux/bpf.h`.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};
use thiserror::Error;

use crate::sys::bpf;

/// One eBPF instruction.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    code: u8,
    /// Source register in the high half, destination in the low half.
    registers: u8,
    offset: i16,
    immediate: i32,
}

// Operation codes, each the sum of a class, an operation and a source.
const LOAD_WORD: u8 = 0x61; // LDX | MEM | W: dst = *(u32 *)(src + offset)
const MOVE_REGISTER: u8 = 0xbf; // ALU64 | MOV | X
const MOVE: u8 = 0xb7; // ALU64 | MOV | K
const AND: u8 = 0x57; // ALU64 | AND | K
const SHIFT_RIGHT: u8 = 0x77; // ALU64 | RSH | K
const JUMP_EQUAL: u8 = 0x15; // JMP | JEQ | K
const JUMP_NOT_EQUAL: u8 = 0x55; // JMP | JNE | K
const EXIT: u8 = 0x95; // JMP | EXIT

const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const TYPE: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

const ACCESS_MKNOD: i32 = 1;
const ACCESS_READ: i32 = 2;
const ACCESS_WRITE: i32 = 4;
const ACCESS_ALL: i32 = ACCESS_MKNOD | ACCESS_READ | ACCESS_WRITE;

const TYPE_BLOCK: i32 = 1;
const TYPE_CHARACTER: i32 = 2;

/// More rules than any container has (Docker's default is about a dozen); keeps jump offsets far below their limit.
pub const RULES_MAX: usize = 1024;

/// Why device rules could not be put in force.
#[derive(Debug, Error)]
pub enum DeviceFilterError {
    /// A rule that cannot be meant.
    #[error("device rule `{rule}` is invalid: {reason}")]
    Rule {
        /// The rule in the devices controller's notation.
        rule: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Too many.
    #[error("{count} device rules are more than the limit of {RULES_MAX}")]
    TooMany {
        /// How many were asked for.
        count: usize,
    },
    /// The kernel refused the program.
    #[error("the kernel refused the device filter")]
    Load(#[source] io::Error),
    /// The kernel refused to attach it.
    #[error("cannot attach the device filter to {cgroup}")]
    Attach {
        /// The cgroup's folder.
        cgroup: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn instruction(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: source << 4 | destination, offset, immediate }
}

/// The program for a list of rules.
pub fn assemble(rules: &[LinuxDeviceCgroup]) -> Result<Vec<Instruction>, DeviceFilterError> {
    if rules.len() > RULES_MAX {
        return Err(DeviceFilterError::TooMany { count: rules.len() });
    }
    let mut program = vec![
        instruction(LOAD_WORD, TYPE, CONTEXT, 0, 0),
        instruction(MOVE_REGISTER, ACCESS, TYPE, 0, 0),
        instruction(AND, TYPE, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        instruction(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        instruction(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules.iter().rev() {
        program.extend(assemble_rule(rule)?);
    }
    program.extend(leave(0));
    Ok(program)
}

fn leave(result: i32) -> [Instruction; 2] {
    [instruction(MOVE, RESULT, 0, 0, result), instruction(EXIT, 0, 0, 0, 0)]
}

fn assemble_rule(rule: &LinuxDeviceCgroup) -> Result<Vec<Instruction>, DeviceFilterError> {
    let access = access_bits(rule)?;
    let mut tests = Vec::new();
    match rule.typ().unwrap_or(LinuxDeviceType::A) {
        LinuxDeviceType::A => {}
        LinuxDeviceType::B => tests.push((TYPE, TYPE_BLOCK)),
        LinuxDeviceType::C | LinuxDeviceType::U => tests.push((TYPE, TYPE_CHARACTER)),
        LinuxDeviceType::P => return Err(invalid(rule, "a pipe is not a device")),
    }
    for (register, number) in [(MAJOR, rule.major()), (MINOR, rule.minor())] {
        // Absent and -1 both mean any.
        if let Some(number) = number.filter(|number| *number != -1) {
            let number =
                u32::try_from(number).map_err(|_| invalid(rule, "a device number does not fit 32 bits"))?;
            // A 64-bit comparison sign-extends its immediate; Linux device numbers stay below 2^20.
            tests.push((
                register,
                i32::try_from(number).map_err(|_| invalid(rule, "a device number is out of range"))?,
            ));
        }
    }
    let mut decision = Vec::new();
    if rule.allow() {
        decision.push(instruction(AND, ACCESS, 0, 0, !access));
        decision.push(instruction(JUMP_NOT_EQUAL, ACCESS, 0, 2, 0));
        decision.extend(leave(1));
    } else {
        decision.push(instruction(MOVE_REGISTER, SCRATCH, ACCESS, 0, 0));
        decision.push(instruction(AND, SCRATCH, 0, 0, access));
        decision.push(instruction(JUMP_EQUAL, SCRATCH, 0, 2, 0));
        decision.extend(leave(0));
    }
    let mut block = Vec::new();
    for (position, (register, value)) in tests.iter().enumerate() {
        let skipped = tests.len() - position - 1 + decision.len();
        block.push(instruction(JUMP_NOT_EQUAL, *register, 0, skipped as i16, *value));
    }
    block.extend(decision);
    Ok(block)
}

fn access_bits(rule: &LinuxDeviceCgroup) -> Result<i32, DeviceFilterError> {
    match rule.access().as_deref() {
        None | Some("") => Ok(ACCESS_ALL),
        Some(letters) => letters.chars().try_fold(0, |bits, letter| match letter {
            'r' => Ok(bits | ACCESS_READ),
            'w' => Ok(bits | ACCESS_WRITE),
            'm' => Ok(bits | ACCESS_MKNOD),
            _ => Err(invalid(rule, "access is made of r, w and m")),
        }),
    }
}

fn invalid(rule: &LinuxDeviceCgroup, reason: &'static str) -> DeviceFilterError {
    DeviceFilterError::Rule { rule: rule.to_string(), reason }
}

/// Puts rules in force for a cgroup v2 folder and everything below it.
pub fn attach(cgroup: &Path, rules: &[LinuxDeviceCgroup]) -> Result<(), DeviceFilterError> {
    let program = bpf::load_device_program(&assemble(rules)?).map_err(DeviceFilterError::Load)?;
    File::open(cgroup)
        .and_then(|folder| bpf::attach_device_program(&folder, &program))
        .map_err(|source| DeviceFilterError::Attach { cgroup: cgroup.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::defaults;
    use oci_spec::runtime::LinuxDeviceCgroupBuilder;
    use proptest::prelude::*;

    /// Runs a program as the kernel would.
    fn run(program: &[Instruction], kind: i32, access: i32, major: u32, minor: u32) -> bool {
        let mut registers = [0_i64; 11];
        let context = [(access << 16 | kind) as u32, major, minor];
        let mut position = 0_usize;
        // Only forward jumps pass the verifier, so the position alone bounds the run.
        loop {
            let Instruction { code, registers: pair, offset, immediate } = program[position];
            let (destination, source) = ((pair & 15) as usize, (pair >> 4) as usize);
            position += 1;
            let mut jump = |taken: bool| {
                if taken {
                    position += usize::try_from(offset).expect("only forward jumps pass the verifier");
                }
            };
            match code {
                LOAD_WORD => {
                    assert_eq!(source, CONTEXT as usize);
                    registers[destination] = i64::from(context[offset as usize / 4]);
                }
                MOVE_REGISTER => registers[destination] = registers[source],
                MOVE => registers[destination] = i64::from(immediate),
                AND => registers[destination] &= i64::from(immediate),
                SHIFT_RIGHT => registers[destination] = (registers[destination] as u64 >> immediate) as i64,
                JUMP_EQUAL => jump(registers[destination] == i64::from(immediate)),
                JUMP_NOT_EQUAL => jump(registers[destination] != i64::from(immediate)),
                EXIT => return registers[0] != 0,
                other => panic!("unknown operation {other:#x}"),
            }
        }
    }

    /// What the rules mean, bit by bit.
    fn expected(rules: &[LinuxDeviceCgroup], kind: i32, access: i32, major: u32, minor: u32) -> bool {
        [ACCESS_MKNOD, ACCESS_READ, ACCESS_WRITE].iter().filter(|bit| access & **bit != 0).all(|bit| {
            rules
                .iter()
                .rev()
                .find(|rule| {
                    let type_matches = match rule.typ().unwrap() {
                        LinuxDeviceType::A => true,
                        LinuxDeviceType::B => kind == TYPE_BLOCK,
                        _ => kind == TYPE_CHARACTER,
                    };
                    type_matches
                        && rule.major().is_none_or(|number| number == i64::from(major))
                        && rule.minor().is_none_or(|number| number == i64::from(minor))
                        && access_bits(rule).unwrap() & bit != 0
                })
                .is_some_and(|rule| rule.allow())
        })
    }

    fn rule(
        allow: bool,
        kind: LinuxDeviceType,
        numbers: (Option<i64>, Option<i64>),
        access: &str,
    ) -> LinuxDeviceCgroup {
        let mut rule = LinuxDeviceCgroupBuilder::default()
            .allow(allow)
            .typ(kind)
            .access(access.to_owned())
            .build()
            .unwrap();
        rule.set_major(numbers.0).set_minor(numbers.1);
        rule
    }

    fn any_rule() -> impl Strategy<Value = LinuxDeviceCgroup> {
        let kind = prop_oneof![Just(LinuxDeviceType::A), Just(LinuxDeviceType::B), Just(LinuxDeviceType::C)];
        let number = || proptest::option::of(0_i64..3);
        let access = proptest::sample::subsequence(vec!['r', 'w', 'm'], 1..=3);
        (any::<bool>(), kind, number(), number(), access).prop_map(|(allow, kind, major, minor, access)| {
            rule(allow, kind, (major, minor), &access.into_iter().collect::<String>())
        })
    }

    proptest! {
        #[test]
        fn the_program_decides_as_the_rules_say(
            rules in proptest::collection::vec(any_rule(), 0..12),
            kind in 1..3, access in 1..8, major in 0_u32..4, minor in 0_u32..4,
        ) {
            let program = assemble(&rules).unwrap();
            prop_assert_eq!(run(&program, kind, access, major, minor), expected(&rules, kind, access, major, minor));
        }
    }

    #[test]
    fn dockers_default_lets_null_be_written_and_disks_only_be_made() {
        let program = assemble(&defaults::device_rules()).unwrap();
        assert!(run(&program, TYPE_CHARACTER, ACCESS_ALL, 1, 3));
        assert!(run(&program, TYPE_CHARACTER, ACCESS_READ | ACCESS_WRITE, 136, 7));
        assert!(run(&program, TYPE_BLOCK, ACCESS_MKNOD, 8, 0));
        assert!(!run(&program, TYPE_BLOCK, ACCESS_READ, 8, 0));
        assert!(!run(&program, TYPE_CHARACTER, ACCESS_READ, 1, 1));
        assert!(!run(&program, TYPE_CHARACTER, ACCESS_READ | ACCESS_MKNOD, 10, 229));
    }

    #[test]
    fn privileged_allows_everything_and_no_rule_nothing() {
        assert!(run(&assemble(&defaults::privileged_device_rules()).unwrap(), TYPE_BLOCK, ACCESS_ALL, 8, 0));
        assert!(!run(&assemble(&[]).unwrap(), TYPE_CHARACTER, ACCESS_READ, 1, 3));
    }

    #[test]
    fn nonsense_is_refused_with_the_rule() {
        let nonsense = rule(true, LinuxDeviceType::C, (Some(1), None), "rx");
        assert_eq!(
            assemble(&[nonsense]).unwrap_err().to_string(),
            "device rule `c 1:* rx` is invalid: access is made of r, w and m"
        );
        assert!(assemble(&[rule(true, LinuxDeviceType::C, (Some(1 << 40), None), "r")]).is_err());
        assert!(assemble(&[rule(true, LinuxDeviceType::P, (None, None), "r")]).is_err());
        assert!(matches!(
            assemble(&vec![LinuxDeviceCgroup::default(); 1025]),
            Err(DeviceFilterError::TooMany { .. })
        ));
    }
}
