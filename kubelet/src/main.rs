//! The `kubelet` program: read the command line, do what it says, end with a code.

mod cli;

/// The agent lives for months with a working set that breathes; the settings (few arenas,
/// background decay) are built in, see `.cargo/config.toml`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> std::process::ExitCode {
    cli::main(std::env::args_os())
}
