//! What is shown while someone waits: on standard error, drawn in place on a terminal, otherwise a line per step that
//! takes longer than a second.

use crate::output::note;
use guest_api::image::ProgressLine;
use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::collections::HashMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

const SHOWN_AFTER: Duration = Duration::from_secs(1);

/// One thing after another.
pub(crate) struct Steps {
    terminal: Option<ProgressBar>,
    step: Option<(String, Instant, bool)>,
}

impl Steps {
    pub(crate) fn new() -> Self {
        Self { terminal: std::io::stderr().is_terminal().then(ProgressBar::new_spinner), step: None }
    }

    /// The step in hand from now on.
    pub(crate) fn begin(&mut self, text: &str) {
        if let Some(bar) = &self.terminal {
            bar.set_message(format!("{text} …"));
            bar.enable_steady_tick(Duration::from_millis(120));
        } else if self.step.as_ref().is_none_or(|(current, ..)| current != text) {
            self.step = Some((text.to_owned(), Instant::now(), false));
        }
    }

    /// To be called now and then; says what is waited for once that has taken a second.
    pub(crate) fn tick(&mut self) {
        if let Some((text, since, said)) = &mut self.step
            && !*said
            && since.elapsed() >= SHOWN_AFTER
        {
            note(&format!("{text} …"));
            *said = true;
        }
    }

    /// Says something that stays.
    pub(crate) fn aside(&self, text: &str) {
        match &self.terminal {
            Some(bar) => bar.suspend(|| note(text)),
            None => note(text),
        }
    }

    pub(crate) fn end(self) {
        if let Some(bar) = self.terminal {
            bar.finish_and_clear();
        }
    }
}

/// The layers of a pull, from the engine's progress lines.
pub(crate) struct Pull {
    bars: Option<MultiProgress>,
    layers: HashMap<String, ProgressBar>,
}

impl Pull {
    pub(crate) fn new() -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bars = terminal.then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));
        Self { bars, layers: HashMap::new() }
    }

    /// Shows one line of the stream.
    pub(crate) fn show(&mut self, line: &ProgressLine) {
        let status = line.status.as_deref().unwrap_or_default();
        let Some(id) = line.id.as_deref() else {
            match &self.bars {
                Some(bars) => drop(bars.println(status)),
                None => note(status),
            }
            return;
        };
        let Some(bars) = &self.bars else {
            // Without a terminal only what happened to a layer, not how far it is.
            let detail = line.progress_detail.unwrap_or_default();
            if detail.current.is_none() {
                note(&format!("{id}: {status}"));
            }
            return;
        };
        let bar = self.layers.entry(id.to_owned()).or_insert_with(|| {
            let style = ProgressStyle::with_template("{prefix}: {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            bars.add(ProgressBar::new(0).with_style(style).with_prefix(id.to_owned()))
        });
        let detail = line.progress_detail.unwrap_or_default();
        bar.set_message(match (detail.current, detail.total) {
            (Some(current), Some(total)) => format!("{status} {}/{}", HumanBytes(current), HumanBytes(total)),
            (Some(current), None) => format!("{status} {}", HumanBytes(current)),
            _ => status.to_owned(),
        });
    }
}
