//! Who a container's process is: names and groups of the image's passwd and group files.
//! Pure over the files' text.

use crate::service::ContainerSecurity;

/// A user as the kernel wants it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResolvedUser {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups, the primary one first.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: String,
}

/// A user that cannot be found.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UserError {
    /// No such name in the image.
    #[error("no user {0:?} in the image's /etc/passwd")]
    NoUser(String),
    /// No such group in the image.
    #[error("no group {0:?} in the image's /etc/group")]
    NoGroup(String),
    /// An id outside of 0…2³²-2.
    #[error("{field} {value} is not a valid id")]
    BadId {
        /// The field it came from.
        field: &'static str,
        /// The number.
        value: i64,
    },
    /// A group without a user says nothing.
    #[error("run_as_group is set without a user")]
    GroupAlone,
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn accounts(passwd: &str) -> impl Iterator<Item = Account<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?.trim();
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).unwrap_or("/");
        Some(Account {
            name,
            uid,
            gid,
            home,
        })
    })
}

/// (name, gid, members) of each group.
fn groups(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?.trim();
        let gid = fields.nth(1)?.parse().ok()?;
        Some((name, gid, fields.next().unwrap_or("").trim()))
    })
}

fn id(field: &'static str, value: i64) -> Result<u32, UserError> {
    let bad = UserError::BadId { field, value };
    let id = u32::try_from(value).map_err(|_| bad)?;
    if id == u32::MAX {
        // -1 means "leave it" to the kernel.
        return Err(UserError::BadId { field, value });
    }
    Ok(id)
}

/// Resolves the process's user: the configuration's id, else its name, else the image's USER
/// (`user`, `uid`, `user:group`, …), else root.
///
/// # Errors
/// [`UserError`] naming what cannot be resolved.
pub fn resolve(
    security: &ContainerSecurity,
    image_user: &str,
    passwd: &str,
    group: &str,
) -> Result<ResolvedUser, UserError> {
    let (image_name, image_group) = match image_user.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|g| !g.is_empty())),
        None => (image_user, None),
    };
    let configured = security.run_as_user.is_some() || security.run_as_username.is_some();
    let wanted = match (security.run_as_user, &security.run_as_username) {
        (Some(uid), _) => id("run_as_user", uid)?.to_string(),
        (None, Some(name)) => name.clone(),
        (None, None) => image_name.to_owned(),
    };
    let account = find_account(&wanted, passwd);
    let uid = match &account {
        Some(account) => account.uid,
        None if wanted.is_empty() => 0,
        None => match wanted.parse::<i64>() {
            Ok(number) => id("user", number)?,
            Err(_) => return Err(UserError::NoUser(wanted)),
        },
    };
    // USER's group part belongs to USER's user only.
    let image_group = image_group.filter(|_| !configured);
    let gid = match (security.run_as_group, image_group) {
        (Some(gid), _) => {
            let gid = id("run_as_group", gid)?;
            if !configured && image_user.is_empty() {
                return Err(UserError::GroupAlone);
            }
            gid
        }
        (None, Some(name)) => find_group(name, group)?,
        (None, None) => account.as_ref().map_or(0, |a| a.gid),
    };
    let mut all = vec![gid];
    if !security.supplemental_groups_strict
        && let Some(account) = &account
    {
        let member = |(_, _, members): &(&str, u32, &str)| {
            members.split(',').any(|m| m.trim() == account.name)
        };
        all.extend(groups(group).filter(member).map(|(_, gid, _)| gid));
    }
    for gid in &security.supplemental_groups {
        all.push(id("supplemental_groups", *gid)?);
    }
    let mut seen = std::collections::BTreeSet::new();
    all.retain(|gid| seen.insert(*gid));
    let home = account.map_or("/", |a| a.home);
    Ok(ResolvedUser {
        uid,
        gid,
        groups: all,
        home: if home.is_empty() { "/" } else { home }.to_owned(),
    })
}

/// By name first, then by number: a user may be called `1000`.
fn find_account<'a>(wanted: &str, passwd: &'a str) -> Option<Account<'a>> {
    let wanted = if wanted.is_empty() { "0" } else { wanted };
    let by_name = accounts(passwd).find(|a| a.name == wanted);
    by_name.or_else(|| {
        let uid: u32 = wanted.parse().ok()?;
        accounts(passwd).find(|a| a.uid == uid)
    })
}

fn find_group(wanted: &str, group: &str) -> Result<u32, UserError> {
    if let Some((_, gid, _)) = groups(group).find(|(name, _, _)| *name == wanted) {
        return Ok(gid);
    }
    match wanted.parse::<i64>() {
        Ok(number) => id("group", number),
        Err(_) => Err(UserError::NoGroup(wanted.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:33:w:/var/www:/bin/false\n";
    const GROUP: &str = "root:x:0:\nweb:x:33:\nlogs:x:50:root,web\nbroken\n";

    fn user(security: &ContainerSecurity, image: &str) -> Result<ResolvedUser, UserError> {
        resolve(security, image, PASSWD, GROUP)
    }

    #[test]
    fn nothing_said_means_root_with_its_groups_and_home() {
        let root = user(&ContainerSecurity::default(), "").unwrap();
        assert_eq!((root.uid, root.gid), (0, 0));
        assert_eq!(root.groups, [0, 50]);
        assert_eq!(root.home, "/root");
    }

    #[test]
    fn the_images_user_is_found_by_name_or_number_with_or_without_group() {
        let none = ContainerSecurity::default();
        for image in ["web", "33"] {
            let web = user(&none, image).unwrap();
            assert_eq!((web.uid, web.gid, web.groups), (33, 33, vec![33, 50]));
        }
        assert_eq!(user(&none, "web:logs").unwrap().gid, 50);
        assert_eq!(user(&none, "web:77").unwrap().gid, 77);
        assert_eq!(user(&none, "70000").unwrap().gid, 0);
        assert_eq!(
            user(&none, "nobody"),
            Err(UserError::NoUser("nobody".into()))
        );
        assert_eq!(user(&none, "web:x"), Err(UserError::NoGroup("x".into())));
    }

    #[test]
    fn the_configured_id_wins_and_drops_the_images_group() {
        let security = ContainerSecurity {
            run_as_user: Some(1000),
            supplemental_groups: vec![5, 5, 0],
            ..ContainerSecurity::default()
        };
        let resolved = user(&security, "web:logs").unwrap();
        assert_eq!((resolved.uid, resolved.gid), (1000, 0));
        assert_eq!(resolved.groups, [0, 5]);
        assert_eq!(resolved.home, "/");
    }

    #[test]
    fn strict_ignores_the_images_groups() {
        let security = ContainerSecurity {
            supplemental_groups: vec![7],
            supplemental_groups_strict: true,
            ..ContainerSecurity::default()
        };
        assert_eq!(user(&security, "web").unwrap().groups, [33, 7]);
    }

    #[test]
    fn impossible_ids_are_named() {
        let security = ContainerSecurity {
            run_as_user: Some(-1),
            ..ContainerSecurity::default()
        };
        let expected = UserError::BadId {
            field: "run_as_user",
            value: -1,
        };
        assert_eq!(user(&security, ""), Err(expected));
    }

    proptest::proptest! {
        #[test]
        fn any_files_are_read_without_a_crash(passwd: String, group: String, name: String) {
            let _ = resolve(&ContainerSecurity::default(), &name, &passwd, &group);
        }
    }
}
