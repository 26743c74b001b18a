//! What an error means to a caller: the one place where codes are chosen (CSI, "Error Scheme").

use crate::error::{DriverError, chain};
use tonic::{Code, Status};

/// The status of an error.
pub(super) fn of(error: &DriverError) -> Status {
    Status::new(code(error), chain(error))
}

fn code(error: &DriverError) -> Code {
    match error {
        DriverError::Invalid { .. } | DriverError::Parameter(_) => Code::InvalidArgument,
        DriverError::NotFound { .. } => Code::NotFound,
        DriverError::Exists { .. } => Code::AlreadyExists,
        // Another operation is pending, or the list has to be begun again.
        DriverError::Busy { .. } | DriverError::BadToken { .. } => Code::Aborted,
        // A provisioner then lets the scheduler choose again.
        DriverError::NoRoom { .. } | DriverError::Elsewhere { .. } => Code::ResourceExhausted,
        DriverError::OutOfRange { .. } => Code::OutOfRange,
        DriverError::Precondition { .. } | DriverError::Damaged { .. } => Code::FailedPrecondition,
        DriverError::Io { source, .. } => of_kernel(source.raw_os_error()),
        DriverError::Fs(error) => of_kernel(error.raw_os_error()),
        DriverError::Command { .. } | DriverError::Program { .. } => Code::Internal,
    }
}

fn of_kernel(number: Option<i32>) -> Code {
    let full = rustix::io::Errno::NOSPC.raw_os_error();
    if number == Some(full) {
        Code::ResourceExhausted
    } else {
        Code::Internal
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_no_bug_and_says_so() {
        let full = std::io::Error::from_raw_os_error(28);
        let status = of(&DriverError::io("write", "/a")(full));
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(status.message().starts_with("write /a: No space left"));
    }

    #[test]
    fn a_busy_volume_is_for_later() {
        let status = of(&DriverError::Busy { id: "v".into() });
        assert_eq!(status.code(), Code::Aborted);
    }
}
