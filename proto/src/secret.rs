//! `Debug` of messages that carry secrets: the name and nothing else.

use crate::csi::v1;
use std::fmt;

macro_rules! hidden {
    ($($message:ident),+ $(,)?) => {$(
        impl fmt::Debug for v1::$message {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($message)).finish_non_exhaustive()
            }
        }
    )+};
}

hidden!(
    CreateVolumeRequest,
    DeleteVolumeRequest,
    ControllerPublishVolumeRequest,
    ControllerUnpublishVolumeRequest,
    ValidateVolumeCapabilitiesRequest,
    ControllerListVolumeHealthRequest,
    ControllerGetVolumeHealthRequest,
    ControllerModifyVolumeRequest,
    CreateSnapshotRequest,
    DeleteSnapshotRequest,
    ListSnapshotsRequest,
    GetSnapshotRequest,
    ControllerExpandVolumeRequest,
    NodeStageVolumeRequest,
    NodePublishVolumeRequest,
    NodeGetStorageHealthRequest,
    NodeExpandVolumeRequest,
    CreateVolumeGroupSnapshotRequest,
    DeleteVolumeGroupSnapshotRequest,
    GetVolumeGroupSnapshotRequest,
    GetMetadataAllocatedRequest,
    GetMetadataDeltaRequest,
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_with_secrets_prints_none_of_them() {
        let mut request = v1::NodeStageVolumeRequest::default();
        request.secrets.insert("password".into(), "hunter2".into());
        let text = format!("{request:?}");
        assert_eq!(text, "NodeStageVolumeRequest { .. }");
    }
}
