//! Container names: which are allowed, and one for a container whose user did not care.

use crate::failure::Failure;

const ADJECTIVES: &[&str] = &[
    "able", "airy", "ample", "ardent", "astute", "balmy", "blithe", "bold", "brave", "breezy", "bright",
    "brisk", "calm", "candid", "careful", "cheerful", "civil", "clear", "clever", "cordial", "cosy", "crisp",
    "curious", "dapper", "daring", "deft", "diligent", "eager", "earnest", "easy", "elated", "exact", "fair",
    "fearless", "fervent", "fleet", "fluent", "fond", "frank", "fresh", "gallant", "gentle", "gleeful",
    "graceful", "grand", "happy", "hardy", "honest", "hopeful", "humble", "jaunty", "jolly", "jovial",
    "keen", "kind", "lively", "loyal", "lucid", "mellow", "merry", "mindful", "modest", "neat", "nimble",
    "noble", "patient", "placid", "plucky", "polite", "proud", "quick", "quiet", "radiant", "ready",
    "robust", "serene", "sharp", "sincere", "smart", "snug", "sober", "spry", "steady", "stoic", "sunny",
    "swift", "tender", "thrifty", "tidy", "tranquil", "trusty", "upbeat", "valiant", "vivid", "warm", "wise",
    "witty", "zesty",
];

/// People who moved science, engineering and the understanding of the world.
const SURNAMES: &[&str] = &[
    "abbe",
    "abel",
    "agnesi",
    "alhazen",
    "ampere",
    "anning",
    "archimedes",
    "avicenna",
    "babbage",
    "banneker",
    "bardeen",
    "bell",
    "bernoulli",
    "boole",
    "borlaug",
    "bose",
    "boyle",
    "brahe",
    "brahmagupta",
    "brunel",
    "cannon",
    "cantor",
    "carnot",
    "carson",
    "carver",
    "cauchy",
    "cavendish",
    "chandra",
    "chatelet",
    "cori",
    "coulomb",
    "curie",
    "dalton",
    "darwin",
    "daubechies",
    "dijkstra",
    "dirac",
    "drew",
    "easley",
    "einstein",
    "erdos",
    "euclid",
    "euler",
    "faraday",
    "fermat",
    "fermi",
    "feynman",
    "fibonacci",
    "fleming",
    "foucault",
    "fourier",
    "franklin",
    "galileo",
    "galois",
    "gauss",
    "germain",
    "goodall",
    "hamilton",
    "harvey",
    "hawking",
    "heisenberg",
    "herschel",
    "hertz",
    "hilbert",
    "hodgkin",
    "hooke",
    "hopper",
    "hubble",
    "huygens",
    "hypatia",
    "johnson",
    "joliot",
    "joule",
    "kepler",
    "khwarizmi",
    "knuth",
    "kovalevskaya",
    "lagrange",
    "lamarr",
    "laplace",
    "lavoisier",
    "leavitt",
    "leibniz",
    "linnaeus",
    "lovelace",
    "mandelbrot",
    "marconi",
    "margulis",
    "maxwell",
    "mayer",
    "mcclintock",
    "meitner",
    "mendel",
    "mendeleev",
    "merian",
    "mirzakhani",
    "morse",
    "napier",
    "nash",
    "newton",
    "nightingale",
    "nobel",
    "noether",
    "ohm",
    "pascal",
    "pasteur",
    "pauli",
    "payne",
    "perlman",
    "planck",
    "poincare",
    "ptolemy",
    "raman",
    "ramanujan",
    "riemann",
    "ritchie",
    "rubin",
    "rutherford",
    "sagan",
    "salk",
    "sammet",
    "shannon",
    "snow",
    "somerville",
    "sutherland",
    "swartz",
    "tereshkova",
    "tesla",
    "thales",
    "thompson",
    "torvalds",
    "turing",
    "volta",
    "wallace",
    "watt",
    "wiles",
    "wozniak",
    "wright",
    "wu",
    "yalow",
    "yonath",
];

/// A random `adjective_surname`. From the `attempt`-th collision on, a digit makes the space larger.
pub fn random(attempt: usize) -> String {
    let pick = |words: &[&'static str]| words[rand::random_range(0..words.len())];
    let name = format!("{}_{}", pick(ADJECTIVES), pick(SURNAMES));
    if attempt < 3 {
        name
    } else {
        format!("{name}{}", rand::random_range(0..10_u64.saturating_pow(attempt as u32 - 2)))
    }
}

/// A new id: 64 hexadecimal digits, the first twelve of which are not all decimal (Docker's rule: a short id that is
/// a number confuses host name checks).
pub fn random_id() -> String {
    loop {
        let id = hex::encode(rand::random::<[u8; 32]>());
        if !id[..12].bytes().all(|byte| byte.is_ascii_digit()) {
            return id;
        }
    }
}

/// Checks a name the user gave, with or without the leading slash, and returns it without.
pub fn check(name: &str) -> Result<&str, Failure> {
    let bare = name.strip_prefix('/').unwrap_or(name);
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    let good = bare.len() >= 2 && bare.as_bytes()[0].is_ascii_alphanumeric() && bare.bytes().all(allowed);
    if good {
        return Ok(bare);
    }
    Err(Failure::invalid(format!(
        "Invalid container name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dockers_rules_for_names_hold() {
        for good in ["web", "/web", "a1", "A_b.c-d", "0x"] {
            assert!(check(good).is_ok(), "{good}");
        }
        for bad in ["", "/", "a", "-web", "_x", ".x", "we b", "we/b", "wéb", "//web"] {
            let failure = check(bad).unwrap_err();
            assert!(failure.message.starts_with("Invalid container name ("), "{bad}");
        }
        assert_eq!(check("/web").unwrap(), "web");
    }

    #[test]
    fn random_names_are_allowed_names() {
        for attempt in 0..6 {
            for _ in 0..100 {
                let name = random(attempt);
                assert_eq!(check(&name).unwrap(), name);
            }
        }
        let mut words: Vec<_> = ADJECTIVES.iter().chain(SURNAMES).collect();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), ADJECTIVES.len() + SURNAMES.len());
    }

    #[test]
    fn ids_are_64_hexadecimal_digits() {
        let id = random_id();
        assert_eq!(id.len(), 64);
        assert!(id.bytes().all(|byte| byte.is_ascii_hexdigit()));
    }
}
