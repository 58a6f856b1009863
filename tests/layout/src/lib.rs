//! The rules of the tree, checked by reading manifests and sources: who may import whom, which foreign crates have a room of
//! their own, where `unsafe` may stand, and that nothing escapes the workspace's one table of versions.
//!
//! `tree` reads, `rules` judges what was read and knows no file system, so each rule is tested on a made-up tree.
#![forbid(unsafe_code)]

pub mod rules;
pub mod tree;
