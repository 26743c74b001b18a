//! Hash of a container's spec: a change means the running container is not the wanted one.

use k8s_openapi::api::core::v1::Container;

/// Hexadecimal hash of what cannot change in place: name and image.
pub fn container_hash(container: &Container) -> String {
    let image = container.image.as_deref().unwrap_or_default();
    // FNV-1a: stable between builds, which the standard hasher is not.
    let bytes = container.name.bytes().chain([0]).chain(image.bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_name_and_image_count() {
        let c = |name: &str, image: &str, tty| Container {
            name: name.into(),
            image: Some(image.into()),
            tty: Some(tty),
            ..Container::default()
        };
        assert_eq!(
            container_hash(&c("a", "b", true)),
            container_hash(&c("a", "b", false))
        );
        assert_ne!(
            container_hash(&c("a", "b", true)),
            container_hash(&c("a", "c", true))
        );
        assert_ne!(
            container_hash(&c("ab", "c", true)),
            container_hash(&c("a", "bc", true))
        );
    }
}
