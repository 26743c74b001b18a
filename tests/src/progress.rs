//! What a person sees while something takes long: a spinner with the elapsed time on a terminal,
//! one line at the start and one at the end elsewhere (CI logs).

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// One long step.
#[derive(Debug)]
pub struct Step {
    title: String,
    started: Instant,
    bar: Option<ProgressBar>,
    last_line: Instant,
}

/// How often a log without a terminal hears that a step goes on.
const REMINDER: Duration = Duration::from_secs(30);

impl Step {
    /// Begins a step and says so.
    #[must_use]
    pub fn begin(title: impl Into<String>) -> Self {
        let title = title.into();
        let now = Instant::now();
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            if let Ok(style) =
                ProgressStyle::with_template("{spinner} {prefix} {elapsed} {msg:.dim}")
            {
                bar.set_style(style);
            }
            bar.set_prefix(title.clone());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        if bar.is_none() {
            eprintln!("… {title}");
        }
        Self {
            title,
            started: now,
            bar,
            last_line: now,
        }
    }

    /// Says what it is at.
    pub fn detail(&mut self, text: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(text.to_owned());
        } else if self.last_line.elapsed() > REMINDER {
            self.last_line = Instant::now();
            eprintln!(
                "  … {} ({:.0} s): {text}",
                self.title,
                self.started.elapsed().as_secs_f32()
            );
        }
    }

    /// Says something that shall stay on the screen, at once.
    pub fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(format!("  {text}")),
            None => eprintln!("  {text}"),
        }
    }

    /// Ends it with success.
    pub fn done(self, result: &str) {
        let separator = if result.is_empty() { "" } else { ": " };
        self.finish(&format!("✓ {}{separator}{result}", self.title));
    }

    fn finish(&self, line: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let seconds = self.started.elapsed().as_secs_f32();
        if seconds >= 0.1 {
            eprintln!("{line} ({seconds:.1} s)");
        } else {
            eprintln!("{line}");
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        // After `done` the bar is finished already; a step dropped by an error leaves no spinner.
        if let Some(bar) = &self.bar
            && !bar.is_finished()
        {
            bar.abandon();
        }
    }
}
