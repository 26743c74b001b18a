//! `kubelet image …`: the node's image store for people.
//!
//! Works beside a running agent and without one: both lock the same store. What a person reads
//! goes to standard output, progress and complaints to standard error.

use clap::{ArgMatches, Args, FromArgMatches as _, Subcommand, ValueEnum};
use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use runtime::image::{ImageError, ImageStore, LayerHandle, LayerProgress, RegistryConfig};
use runtime::service::{ImageStatus, RegistryAuth};
use serde::Deserialize;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

/// Look at, fetch and remove the images stored on this node.
///
/// Examples:
///   kubelet image pull registry.k8s.io/pause:3.10.2
///   kubelet image load image.tar.gz
///   kubelet image ls -o json
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
struct ImageArgs {
    /// Settings of the runtime (YAML): its root directory and registry mirrors.
    #[arg(long, value_name = "FILE", global = true)]
    runtime_config: Option<PathBuf>,
    /// Directory of the runtime's state; wins over the file's `root`.
    #[arg(long, value_name = "DIR", global = true)]
    runtime_root: Option<PathBuf>,
    #[command(subcommand)]
    command: ImageCommand,
}

/// What to do.
#[derive(Debug, Subcommand)]
enum ImageCommand {
    /// Fetch images from their registries, through the configured mirrors.
    Pull {
        /// Names, such as `busybox` or `registry.k8s.io/pause:3.10.2`.
        #[arg(required = true)]
        images: Vec<String>,
        /// Credentials, `USER:PASSWORD`.
        #[arg(
            long,
            value_name = "USER:PASSWORD",
            env = "KUBELET_IMAGE_CREDS",
            hide_env_values = true
        )]
        creds: Option<String>,
    },
    /// Load archives made by `docker save`, `kubelet image export` or any tool that writes OCI
    /// layouts; plain, gzip or zstd.
    Load {
        /// Archives; `-` is standard input.
        #[arg(required = true)]
        archives: Vec<PathBuf>,
    },
    /// List the stored images.
    #[command(visible_alias = "list")]
    Ls {
        /// Form of the list.
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
        /// Whole ids and digests.
        #[arg(long)]
        no_trunc: bool,
    },
    /// Remove names; with its last name an image goes, and with its last image a layer.
    #[command(visible_alias = "remove")]
    Rm {
        /// Names, ids or beginnings of ids.
        #[arg(required = true)]
        images: Vec<String>,
        /// Also when containers were made from it.
        #[arg(long)]
        force: bool,
    },
    /// Write an image to an archive (OCI layout) others can load.
    Export {
        /// Name or id.
        image: String,
        /// File to write.
        archive: PathBuf,
    },
}

/// Form of a list.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    #[default]
    Table,
    /// For programs.
    Json,
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
enum ImageCommandError {
    /// The store said no.
    #[error(transparent)]
    Store(#[from] ImageError),
    /// A pull failed.
    #[error(transparent)]
    Pull(#[from] Arc<ImageError>),
    /// The runtime's settings cannot be used.
    #[error("cannot use runtime settings {path}: {reason}")]
    Config {
        /// File.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Credentials without a colon.
    #[error("--creds must be USER:PASSWORD")]
    Credentials,
    /// Containers need it.
    #[error("image {image} is used by containers {containers}; stop their pods, or use --force")]
    Used {
        /// As given.
        image: String,
        /// Ids, shortened.
        containers: String,
    },
    /// Reading or writing failed.
    #[error("failed to {0}")]
    Io(&'static str, #[source] std::io::Error),
}

type Result<T> = std::result::Result<T, ImageCommandError>;

/// The part of the runtime's settings that matters here.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RuntimeFile {
    root: Option<PathBuf>,
    registries: RegistryConfig,
}

/// Where the runtime keeps its state when nothing says otherwise.
const DEFAULT_ROOT: &str = "/var/lib/ferrule";

/// The subcommand for clap.
pub(super) fn command() -> clap::Command {
    ImageArgs::augment_args(clap::Command::new("image"))
}

/// Does what the words after `kubelet image` say.
pub(super) fn main(matches: &ArgMatches) -> ExitCode {
    let args = match ImageArgs::from_arg_matches(matches) {
        Ok(args) => args,
        Err(error) => error.exit(),
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("kubelet: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(args, &mut std::io::stdout())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kubelet: {}", kubelet::errors::chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// Runs `kubelet image …`; lists go to `out`.
///
/// # Errors
/// [`ImageCommandError`], one sentence for people.
async fn run(args: ImageArgs, out: &mut (dyn Write + Send)) -> Result<()> {
    // Whoever installed one first wins; all install the same.
    drop(rustls::crypto::ring::default_provider().install_default());
    let (root, registries) = settings(&args)?;
    let store = ImageStore::open(&root, registries)?;
    match args.command {
        ImageCommand::Pull { images, creds } => pull(&store, &images, creds.as_deref(), out).await,
        ImageCommand::Load { archives } => load(&store, &archives, out).await,
        ImageCommand::Ls { output, no_trunc } => list(&store.list(), output, no_trunc, out),
        ImageCommand::Rm { images, force } => remove(&store, &root, &images, force, out).await,
        ImageCommand::Export { image, archive } => {
            let step = spinner(format!("exporting {image}"));
            let done = store.export(&image, &archive).await;
            step.finish_and_clear();
            done?;
            line(out, &format!("{image} written to {}", archive.display()))
        }
    }
}

fn settings(args: &ImageArgs) -> Result<(PathBuf, RegistryConfig)> {
    let file = match &args.runtime_config {
        None => RuntimeFile::default(),
        Some(path) => {
            let failed = |reason: String| ImageCommandError::Config {
                path: path.clone(),
                reason,
            };
            let text = std::fs::read_to_string(path).map_err(|e| failed(e.to_string()))?;
            serde_saphyr::from_str(&text).map_err(|e| failed(e.to_string()))?
        }
    };
    let root = args.runtime_root.clone().or(file.root);
    Ok((
        root.unwrap_or_else(|| PathBuf::from(DEFAULT_ROOT)),
        file.registries,
    ))
}

async fn pull(
    store: &ImageStore,
    images: &[String],
    creds: Option<&str>,
    out: &mut (dyn Write + Send),
) -> Result<()> {
    let auth: Vec<RegistryAuth> = match creds.map(|c| c.split_once(':')) {
        None => Vec::new(),
        Some(None) => return Err(ImageCommandError::Credentials),
        Some(Some((username, password))) => vec![RegistryAuth::Basic {
            username: username.to_owned(),
            password: password.to_owned(),
        }],
    };
    let bars = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
    let pulls = images.iter().map(|image| {
        let bars = bars.clone();
        let observer: runtime::image::Observer =
            Arc::new(move |layers: &[LayerHandle]| show_layers(&bars, layers));
        store.pull_observed(image, &auth, Some(observer))
    });
    // All at once; the first failure is told after the others ended.
    let results = futures::future::join_all(pulls).await;
    drop(bars.clear());
    let mut failed = None;
    for (image, result) in images.iter().zip(results) {
        match result {
            Ok(status) => line(out, &format!("{image}: {}", status.id))?,
            Err(error) => failed = Some(error),
        }
    }
    failed.map_or(Ok(()), |error| Err(error.into()))
}

/// One bar per layer; each follows its layer until it is done.
fn show_layers(bars: &MultiProgress, layers: &[LayerHandle]) {
    if !std::io::stderr().is_terminal() {
        return;
    }
    for layer in layers {
        let bar = bars.add(ProgressBar::new(layer.size_bytes));
        let template = "{prefix:.bold} {wide_bar:.cyan/dim} {bytes:>10}/{total_bytes:10} {msg:9}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("━╸─"));
        }
        bar.set_prefix(short(&layer.digest).to_owned());
        let mut progress = layer.progress.clone();
        tokio::spawn(async move {
            loop {
                match *progress.borrow_and_update() {
                    LayerProgress::Waiting => bar.set_message("waiting"),
                    LayerProgress::Downloading(bytes) => {
                        bar.set_message("");
                        bar.set_position(bytes);
                    }
                    LayerProgress::Done => break,
                }
                // The sender goes when the layer failed; the pull tells why.
                if progress.changed().await.is_err() {
                    bar.abandon_with_message("failed");
                    return;
                }
            }
            bar.set_position(bar.length().unwrap_or(0));
            bar.finish_with_message("done");
        });
    }
}

async fn load(
    store: &ImageStore,
    archives: &[PathBuf],
    out: &mut (dyn Write + Send),
) -> Result<()> {
    for archive in archives {
        let from_stdin = archive.as_os_str() == "-";
        let step = spinner(format!("loading {}", archive.display()));
        let loaded = if from_stdin {
            let file = spool(std::io::stdin().lock())?;
            store.load(file.path()).await
        } else {
            store.load(archive).await
        };
        step.finish_and_clear();
        for status in loaded? {
            let name = status.repo_tags.first().map_or("<none>", String::as_str);
            line(out, &format!("{name}: {}", status.id))?;
        }
    }
    Ok(())
}

/// An archive must be seekable; a pipe is not.
fn spool(mut input: impl std::io::Read) -> Result<Spooled> {
    let failed = |e| ImageCommandError::Io("read the archive from standard input", e);
    let path = std::env::temp_dir().join(format!("kubelet-image-{}", std::process::id()));
    let mut file = std::fs::File::create_new(&path).map_err(failed)?;
    let spooled = Spooled(path);
    std::io::copy(&mut input, &mut file).map_err(failed)?;
    Ok(spooled)
}

/// A temporary file that goes with this value.
struct Spooled(PathBuf);

impl Spooled {
    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Spooled {
    fn drop(&mut self) {
        // Nothing can be done about a failure; the file is in the temporary directory.
        drop(std::fs::remove_file(&self.0));
    }
}

async fn remove(
    store: &ImageStore,
    root: &Path,
    images: &[String],
    force: bool,
    out: &mut (dyn Write + Send),
) -> Result<()> {
    for image in images {
        let Some(status) = store.status(image) else {
            return Err(ImageError::NotStored(image.clone()).into());
        };
        let users = containers_of(root, &status);
        if !users.is_empty() && !force {
            let (image, containers) = (image.clone(), users.join(", "));
            return Err(ImageCommandError::Used { image, containers });
        }
        store.remove(image).await?;
        line(out, &format!("{image}: removed"))?;
    }
    Ok(())
}

/// Containers recorded with this image. The agent's own leases only count while it runs, but its
/// containers outlive it, so their records are asked too.
fn containers_of(root: &Path, image: &ImageStatus) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(root.join("containers")) else {
        return Vec::new();
    };
    entries
        .filter_map(std::result::Result::ok)
        .filter(|entry| {
            let record = std::fs::read_to_string(entry.path().join("container.json"));
            record.is_ok_and(|text| text.contains(image.id.as_str()))
        })
        .map(|entry| short(&entry.file_name().to_string_lossy()).to_owned())
        .collect()
}

fn list(
    images: &[ImageStatus],
    output: Output,
    no_trunc: bool,
    out: &mut (dyn Write + Send),
) -> Result<()> {
    match output {
        Output::Json => {
            let failed = |e: serde_json::Error| ImageCommandError::Io("print", e.into());
            let text = serde_json::to_string_pretty(images).map_err(failed)?;
            line(out, &text)
        }
        Output::Table => {
            for row in table(images, no_trunc) {
                line(out, &row)?;
            }
            Ok(())
        }
    }
}

/// One row per name, under a heading; pure.
fn table(images: &[ImageStatus], no_trunc: bool) -> Vec<String> {
    let heading = ["IMAGE", "TAG", "IMAGE ID", "SIZE"].map(str::to_owned);
    let mut rows = vec![heading];
    for image in images {
        let id = if no_trunc {
            image.id.as_str()
        } else {
            short(image.id.as_str())
        };
        let size = HumanBytes(image.size_bytes).to_string();
        let names: Vec<(String, String)> = if image.repo_tags.is_empty() {
            let name = image.repo_digests.first().and_then(|d| d.split_once('@'));
            let name = name.map_or("<none>", |(name, _)| name);
            vec![(name.to_owned(), "<none>".to_owned())]
        } else {
            let split = |t: &String| {
                t.rsplit_once(':')
                    .map(|(n, t)| (n.to_owned(), t.to_owned()))
            };
            image.repo_tags.iter().filter_map(split).collect()
        };
        for (name, tag) in names {
            rows.push([name, tag, id.to_owned(), size.clone()]);
        }
    }
    rows[1..].sort();
    let width = |column: usize| {
        rows.iter()
            .map(|r| r[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let (name, tag, id) = (width(0), width(1), width(2));
    rows.iter()
        .map(|[n, t, i, s]| format!("{n:name$}  {t:tag$}  {i:id$}  {s}"))
        .map(|row| row.trim_end().to_owned())
        .collect()
}

fn short(id: &str) -> &str {
    let hex = id.strip_prefix("sha256:").unwrap_or(id);
    hex.get(..12).unwrap_or(hex)
}

fn spinner(text: String) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    bar.set_style(ProgressStyle::default_spinner());
    bar.set_message(text);
    // Draws only; nothing waits on it.
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

fn line(out: &mut (dyn Write + Send), text: &str) -> Result<()> {
    writeln!(out, "{text}").map_err(|e| ImageCommandError::Io("print", e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use runtime::service::{ImageConfig, ImageId};

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        image: ImageArgs,
    }

    fn image(id: char, tags: &[&str], digests: &[&str]) -> ImageStatus {
        let own = |texts: &[&str]| texts.iter().map(|t| (*t).to_owned()).collect();
        ImageStatus {
            id: ImageId(format!("sha256:{}", id.to_string().repeat(64))),
            repo_tags: own(tags),
            repo_digests: own(digests),
            size_bytes: 3 << 20,
            pinned: false,
            user: String::new(),
            config: ImageConfig::default(),
        }
    }

    async fn cli(words: &[&str]) -> (String, Result<()>) {
        let cli = Cli::try_parse_from([&["image"], words].concat()).unwrap();
        let mut out = Vec::new();
        let result = run(cli.image, &mut out).await;
        (String::from_utf8(out).unwrap(), result)
    }

    #[test]
    fn the_table_has_a_row_per_name_and_none_for_what_is_missing() {
        let images = [
            image('b', &["r.io/b:1", "r.io:5000/a:2"], &[]),
            image('c', &[], &["r.io/c@sha256:1"]),
        ];
        assert_eq!(
            table(&images, false),
            [
                "IMAGE        TAG     IMAGE ID      SIZE",
                "r.io/b       1       bbbbbbbbbbbb  3.00 MiB",
                "r.io/c       <none>  cccccccccccc  3.00 MiB",
                "r.io:5000/a  2       bbbbbbbbbbbb  3.00 MiB",
            ]
        );
    }

    #[tokio::test]
    async fn an_empty_store_lists_nothing_and_what_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_str().unwrap();
        let (out, result) = cli(&["ls", "-o", "json", "--runtime-root", root]).await;
        result.unwrap();
        assert_eq!(out, "[]\n");
        let (_, result) = cli(&["rm", "nosuch:1", "--runtime-root", root]).await;
        assert!(result.unwrap_err().to_string().contains("nosuch:1"));
        let (_, result) = cli(&["load", "/nonexistent.tar", "--runtime-root", root]).await;
        assert!(result.unwrap_err().to_string().contains("/nonexistent.tar"));
    }

    #[tokio::test]
    async fn a_bad_settings_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("runtime.yaml");
        std::fs::write(&path, "registries: {mirors: {}}").unwrap();
        let (_, result) = cli(&["ls", "--runtime-config", path.to_str().unwrap()]).await;
        let text = result.unwrap_err().to_string();
        assert!(
            text.contains("runtime.yaml") && text.contains("mirors"),
            "{text}"
        );
    }
}
