//! The gRPC face: requests become plain values, answers become messages. Nothing here touches a
//! file, a device or a mount.

mod authority;
mod controller;
mod convert;
mod group;
mod identity;
mod node;
mod registration;
mod server;
mod status;

pub use server::{RegistrationSocket, Sockets, serve};

use crate::driver::Driver;
use crate::error::{DriverError, chain};
use std::sync::Arc;
use tonic::Status;

/// All services of a driver.
#[derive(Debug, Clone)]
pub struct Service {
    driver: Arc<Driver>,
}

impl Service {
    /// The services of this driver.
    #[must_use]
    pub fn new(driver: Arc<Driver>) -> Self {
        Self { driver }
    }

    /// Runs an operation on a thread that may block. It goes on to its end when the caller hangs
    /// up: half of it would have to be undone, and the caller will ask again.
    async fn run<T: Send + 'static>(
        &self,
        operation: &'static str,
        id: &str,
        work: impl FnOnce(&Driver) -> Result<T, DriverError> + Send + 'static,
    ) -> Result<T, Status> {
        let driver = Arc::clone(&self.driver);
        let started = std::time::Instant::now();
        let outcome = tokio::task::spawn_blocking(move || work(&driver)).await;
        let took_ms = started.elapsed().as_millis();
        match outcome {
            Ok(Ok(answer)) => {
                tracing::debug!(operation, id, took_ms, "Done");
                Ok(answer)
            }
            Ok(Err(error)) => {
                let status = status::of(&error);
                let code = status.code();
                let error = chain(&error);
                tracing::warn!(operation, id, took_ms, ?code, error, "Refused");
                Err(status)
            }
            Err(error) => {
                tracing::error!(operation, id, %error, "An operation broke off");
                Err(Status::internal(format!("{operation} broke off")))
            }
        }
    }
}
