//! Generates the modules from the vendored files.

/// Messages that carry secrets: their `Debug` is written by hand in `src/secret.rs`.
const WITH_SECRETS: [&str; 22] = [
    "CreateVolumeRequest",
    "DeleteVolumeRequest",
    "ControllerPublishVolumeRequest",
    "ControllerUnpublishVolumeRequest",
    "ValidateVolumeCapabilitiesRequest",
    "ControllerListVolumeHealthRequest",
    "ControllerGetVolumeHealthRequest",
    "ControllerModifyVolumeRequest",
    "CreateSnapshotRequest",
    "DeleteSnapshotRequest",
    "ListSnapshotsRequest",
    "GetSnapshotRequest",
    "ControllerExpandVolumeRequest",
    "NodeStageVolumeRequest",
    "NodePublishVolumeRequest",
    "NodeGetStorageHealthRequest",
    "NodeExpandVolumeRequest",
    "CreateVolumeGroupSnapshotRequest",
    "DeleteVolumeGroupSnapshotRequest",
    "GetVolumeGroupSnapshotRequest",
    "GetMetadataAllocatedRequest",
    "GetMetadataDeltaRequest",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let csi = protox::compile(["vendor/csi/v1/csi.proto"], ["vendor/csi/v1"])?;
    let registration = protox::compile(
        ["vendor/pluginregistration/v1/api.proto"],
        ["vendor/pluginregistration/v1"],
    )?;
    let hidden = WITH_SECRETS.map(|message| format!(".csi.v1.{message}"));
    tonic_prost_build::configure()
        .skip_debug(hidden)
        .compile_fds(csi)?;
    tonic_prost_build::configure().compile_fds(registration)?;
    println!("cargo:rerun-if-changed=vendor");
    Ok(())
}
