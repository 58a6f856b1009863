//! The rules, applied to this checkout.
#![forbid(unsafe_code)]

use std::path::Path;

use tests_layout::rules;
use tests_layout::tree::Tree;

#[test]
fn the_checkout_keeps_the_rules() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let tree = Tree::read(&root).unwrap_or_else(|error| panic!("cannot read the checkout: {error}"));
    assert!(tree.crates.len() > 10, "only {} crates were found", tree.crates.len());
    let found = rules::violations(&tree);
    assert!(found.is_empty(), "{} violations:\n  {}", found.len(), found.join("\n  "));
}
