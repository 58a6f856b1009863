//! Points at which a test may kill the process, to see what is left. Release builds have none.

/// Kills the process here when `ENGINE_FAULT` names this point.
#[inline]
pub(crate) fn point(name: &str) {
    #[cfg(debug_assertions)]
    if wanted().is_some_and(|wanted| wanted == name) {
        // As the kernel would, without a chance to tidy: nothing runs after this.
        let _sent = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
    #[cfg(not(debug_assertions))]
    let _ = name;
}

#[cfg(debug_assertions)]
fn wanted() -> Option<&'static str> {
    static WANTED: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    WANTED.get_or_init(|| std::env::var("ENGINE_FAULT").ok()).as_deref()
}
