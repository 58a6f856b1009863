# The index of every command. `just` is not needed: each recipe is one line to copy.

# what there is
default:
    @just --list

# from a fresh checkout to a container in our VM
quickstart:
    ./installer/quickstart

# install what a build, the tests and our own kernel need
setup:
    ./installer/setup --tests --kernel

# programs and VM image into target/release/
build:
    ./installer/build

# the VM image alone; for example `just vm-image --kernel own`, or `--level 9` to compress faster
vm-image *options:
    ./installer/build {{options}}

# all tests, or the stages named: lint unit native qemu fuzz
test *stages:
    ./tests/run {{stages}}

# formatting, clippy, shell scripts, import rules
check:
    ./tests/run lint

# unit and property tests of one crate: `just unit host-net`
unit crate *filter:
    cargo test -p {{crate}} {{filter}}

# end to end in the VM
e2e:
    ./tests/run qemu

# one fuzz target for some seconds: `just fuzz fuzz_session 60`
fuzz target seconds="60":
    ./tests/fuzz/run {{seconds}} {{target}}

# the numbers we promise
bench:
    cargo run --release -p tests-bench

# format everything
format:
    cargo fmt --all

# the pages of every crate's public items
docs:
    cargo doc --workspace --no-deps --open
