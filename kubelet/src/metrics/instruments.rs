//! Counters, gauges and histograms: atomics, so that counting costs nanoseconds and never waits.
//! Those with labels keep their series in a map; a series is found by a short lock.

use super::text::{Family, Kind, Page};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Series kept per family with labels. Beyond it new label values are not counted: labels come
/// from what users make (pods, containers), and nothing here may grow without bound.
const MAX_SERIES: usize = 10_000;

/// Only ever grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// One more.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Some more.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Relaxed);
    }

    /// How many so far.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(AtomicI64);

impl Gauge {
    /// Sets it.
    pub fn set(&self, value: i64) {
        self.0.store(value, Relaxed);
    }

    /// Changes it.
    pub fn add(&self, change: i64) {
        self.0.fetch_add(change, Relaxed);
    }

    /// Its value.
    pub fn get(&self) -> i64 {
        self.0.load(Relaxed)
    }
}

/// Observations by size.
#[derive(Debug)]
pub struct Histogram {
    bounds: &'static [f64],
    /// One more than bounds.
    counts: Box<[AtomicU64]>,
    /// Bits of a float.
    sum: AtomicU64,
}

impl Histogram {
    /// With these upper bounds, ascending.
    pub fn new(bounds: &'static [f64]) -> Self {
        Self {
            bounds,
            counts: (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect(),
            sum: AtomicU64::new(0),
        }
    }

    /// One observation.
    pub fn observe(&self, value: f64) {
        let place = self.bounds.partition_point(|bound| *bound < value);
        self.counts[place].fetch_add(1, Relaxed);
        let add = |bits: u64| Some((f64::from_bits(bits) + value).to_bits());
        let _ = self.sum.fetch_update(Relaxed, Relaxed, add);
    }

    /// A duration, in seconds.
    pub fn observe_time(&self, time: Duration) {
        self.observe(time.as_secs_f64());
    }

    /// Upper bounds but for the infinite one.
    pub fn bounds(&self) -> &'static [f64] {
        self.bounds
    }

    /// Counts by bucket, the one without a bound last, and the sum.
    pub fn read(&self) -> (Vec<u64>, f64) {
        let counts = self.counts.iter().map(|c| c.load(Relaxed)).collect();
        (counts, f64::from_bits(self.sum.load(Relaxed)))
    }
}

/// What can be in a family with labels.
pub trait Instrument {
    /// Writes its samples.
    fn write(&self, family: Family, labels: &[(&str, &str)], page: &mut Page);
}

impl Instrument for Counter {
    fn write(&self, family: Family, labels: &[(&str, &str)], page: &mut Page) {
        page.put(family, labels, self.get() as f64);
    }
}

impl Instrument for Gauge {
    fn write(&self, family: Family, labels: &[(&str, &str)], page: &mut Page) {
        page.put(family, labels, self.get() as f64);
    }
}

impl Instrument for Histogram {
    fn write(&self, family: Family, labels: &[(&str, &str)], page: &mut Page) {
        page.put_histogram(family, labels, self);
    }
}

/// A family with `N` labels.
pub struct Labelled<I, const N: usize> {
    family: Family,
    names: [&'static str; N],
    make: fn() -> I,
    series: Mutex<BTreeMap<[String; N], Arc<I>>>,
}

impl<I, const N: usize> std::fmt::Debug for Labelled<I, N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Labelled")
            .field("family", &self.family)
            .finish_non_exhaustive()
    }
}

impl<const N: usize> Labelled<Counter, N> {
    /// Counters.
    pub fn counter(name: &'static str, help: &'static str, names: [&'static str; N]) -> Self {
        Self::new(Family::counter(name, help), names, Counter::default)
    }
}

impl<const N: usize> Labelled<Gauge, N> {
    /// Gauges.
    pub fn gauge(name: &'static str, help: &'static str, names: [&'static str; N]) -> Self {
        Self::new(Family::gauge(name, help), names, Gauge::default)
    }
}

impl<const N: usize> Labelled<Histogram, N> {
    /// Histograms, made by `make`.
    pub fn histogram(
        name: &'static str,
        help: &'static str,
        names: [&'static str; N],
        make: fn() -> Histogram,
    ) -> Self {
        Self::new(Family::histogram(name, help), names, make)
    }
}

impl<I, const N: usize> Labelled<I, N> {
    fn new(family: Family, names: [&'static str; N], make: fn() -> I) -> Self {
        Self {
            family,
            names,
            make,
            series: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<[String; N], Arc<I>>> {
        self.series.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The series with these label values.
    pub fn with(&self, values: [&str; N]) -> Arc<I> {
        let key = values.map(str::to_owned);
        let mut series = self.lock();
        if let Some(known) = series.get(&key) {
            return Arc::clone(known);
        }
        let new = Arc::new((self.make)());
        if series.len() < MAX_SERIES {
            series.insert(key, Arc::clone(&new));
        }
        new
    }

    /// Forgets the series that `keep` refuses.
    pub fn retain(&self, keep: impl Fn(&[String; N]) -> bool) {
        self.lock().retain(|values, _| keep(values));
    }
}

impl<I: Instrument, const N: usize> Labelled<I, N> {
    /// Writes all series.
    pub fn write(&self, page: &mut Page) {
        for (values, instrument) in self.lock().iter() {
            let labels: [(&str, &str); N] =
                std::array::from_fn(|i| (self.names[i], values[i].as_str()));
            instrument.write(self.family, &labels, page);
        }
    }

    /// The meaning of the family.
    pub fn kind(&self) -> Kind {
        self.family.kind
    }
}

impl<const N: usize> Labelled<Histogram, N> {
    /// Writes how many observations each series has, as a family of its own.
    pub fn write_counts(&self, family: Family, page: &mut Page) {
        for (values, histogram) in self.lock().iter() {
            let labels: [(&str, &str); N] =
                std::array::from_fn(|i| (self.names[i], values[i].as_str()));
            let count: u64 = histogram.read().0.iter().sum();
            page.put(family, &labels, count as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_on_a_bound_is_below_it() {
        let histogram = Histogram::new(&[1.0, 2.0]);
        histogram.observe(1.0);
        histogram.observe(2.5);
        assert_eq!(histogram.read(), (vec![1, 0, 1], 3.5));
    }

    #[test]
    fn series_are_found_again_forgotten_and_bounded() {
        let family = Labelled::counter("x_total", "X.", ["pod"]);
        family.with(["a"]).inc();
        family.with(["a"]).inc();
        assert_eq!(family.with(["a"]).get(), 2);
        family.retain(|[pod]| pod != "a");
        assert_eq!(family.with(["a"]).get(), 0);
        for i in 0..MAX_SERIES + 5 {
            family.with([&i.to_string()]).inc();
        }
        assert_eq!(family.lock().len(), MAX_SERIES);
        assert_eq!(family.kind(), Kind::Counter);
    }
}
