//! Whether an image is for the machine it is to run on.

use guest_images::Platform;

use crate::failure::Failure;

/// Refuses an image that is not for the platform asked for; says so when nothing was asked and it is not for this one.
pub fn check(name: &str, image: &Platform, asked: Option<&Platform>) -> Result<Option<String>, Failure> {
    // An image that does not say is taken as it is.
    if image.os.is_empty() || image.architecture.is_empty() {
        return Ok(None);
    }
    let host = Platform::host();
    match asked {
        Some(asked) if asked.fit(image).is_none() => Err(Failure::not_found(format!(
            "image with reference {name} was found but its platform ({image}) does not match the specified platform \
             ({asked})"
        ))),
        None if host.fit(image).is_none() => Ok(Some(format!(
            "The requested image's platform ({image}) does not match the detected host platform ({host}) and no \
             specific platform was requested"
        ))),
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_for_another_machine_is_told() {
        let host = Platform::host();
        let other: Platform = "linux/s390x".parse().unwrap();
        assert_eq!(check("x", &host, None), Ok(None));
        assert_eq!(check("x", &host, Some(&host)), Ok(None));
        assert_eq!(check("x", &Platform::default(), Some(&other)), Ok(None));
        assert!(
            check("x", &other, None).unwrap().unwrap().contains("(linux/s390x) does not match the detected")
        );
        let refusal = check("x", &host, Some(&other)).unwrap_err();
        assert!(refusal.message.ends_with("does not match the specified platform (linux/s390x)"));
    }
}
