//! Who a process runs as: `user[:group]`, names or numbers, looked up in the container's own /etc/passwd and
//! /etc/group. Pure: the files come in as text.

use crate::failure::Failure;

/// The ids a process gets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    /// Supplementary groups.
    pub additional: Vec<u32>,
    /// Home folder; `/` when unknown.
    pub home: String,
}

struct Passwd<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn passwd_lines(text: &str) -> impl Iterator<Item = Passwd<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let name = fields.next().filter(|name| !name.is_empty() && !name.starts_with('#'))?;
        let (uid, gid) = (fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
        let home = fields.nth(1).filter(|home| !home.is_empty()).unwrap_or("/");
        Some(Passwd { name, uid, gid, home })
    })
}

fn group_lines(text: &str) -> impl Iterator<Item = Group<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let name = fields.next().filter(|name| !name.is_empty() && !name.starts_with('#'))?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some(Group { name, gid, members: fields.next().unwrap_or_default() })
    })
}

/// Resolves what the user asked for. `extra_groups` are `GroupAdd`.
pub fn resolve(wanted: &str, extra_groups: &[String], passwd: &str, group: &str) -> Result<User, Failure> {
    let (user_part, group_part) = match wanted.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (wanted, None),
    };
    let number = user_part.parse::<u32>().ok();
    let entry = match user_part {
        "" => passwd_lines(passwd).find(|line| line.uid == 0),
        // A user may be called by a number, and then the name wins, as with Docker.
        _ => passwd_lines(passwd)
            .find(|line| line.name == user_part)
            .or_else(|| passwd_lines(passwd).find(|line| Some(line.uid) == number)),
    };
    let mut user = match (&entry, number) {
        (Some(line), _) => {
            User { uid: line.uid, gid: line.gid, additional: Vec::new(), home: line.home.to_owned() }
        }
        (None, _) if user_part.is_empty() => User { home: "/root".to_owned(), ..User::default() },
        (None, Some(uid)) if uid <= i32::MAX as u32 => User { uid, home: "/".to_owned(), ..User::default() },
        (None, _) if is_number(user_part) => return Err(out_of_range()),
        (None, _) => {
            return Err(Failure::invalid(format!(
                "unable to find user {user_part}: no matching entries in passwd file"
            )));
        }
    };
    match group_part {
        Some(wanted) => user.gid = group_id(wanted, group, "unable")?,
        // With a group named, the user's other groups are not taken.
        None => {
            if let Some(line) = &entry {
                let member =
                    |group: &Group<'_>| group.members.split(',').any(|name| name.trim() == line.name);
                user.additional = group_lines(group).filter(member).map(|group| group.gid).collect();
            }
        }
    }
    for extra in extra_groups {
        user.additional.push(group_id(extra, group, "Unable")?);
    }
    user.additional.retain(|gid| *gid != user.gid);
    user.additional.sort_unstable();
    user.additional.dedup();
    Ok(user)
}

/// However long.
fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn out_of_range() -> Failure {
    Failure::invalid("uids and gids must be in range 0-2147483647")
}

/// `unable`: how dockerd begins the sentence; it depends on where the group is named.
fn group_id(wanted: &str, group: &str, unable: &str) -> Result<u32, Failure> {
    if let Some(line) = group_lines(group).find(|line| line.name == wanted) {
        return Ok(line.gid);
    }
    match wanted.parse::<u32>() {
        Ok(gid) if gid <= i32::MAX as u32 => Ok(gid),
        _ if is_number(wanted) => Err(out_of_range()),
        _ => Err(Failure::invalid(format!(
            "{unable} to find group {wanted}: no matching entries in group file"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n# comment\nbroken line\nwww:x:33:34:www:/var/www:/bin/false\n\
        1001:x:7:7::/seven:/bin/sh\nnohome:x:50:50::\n";
    const GROUP: &str =
        "root:x:0:\nwheel:x:10:root,www\nwww:x:34:\nvideo:x:44:www , other\ntape:x:26:other\n";

    fn ids(wanted: &str) -> (u32, u32, Vec<u32>, String) {
        let user = resolve(wanted, &[], PASSWD, GROUP).unwrap();
        (user.uid, user.gid, user.additional, user.home)
    }

    #[test]
    fn nobody_named_is_root_with_its_groups() {
        assert_eq!(ids(""), (0, 0, vec![10], "/root".into()));
        assert_eq!(resolve("", &[], "", "").unwrap().home, "/root");
    }

    #[test]
    fn names_and_numbers_are_looked_up() {
        assert_eq!(ids("www"), (33, 34, vec![10, 44], "/var/www".into()));
        assert_eq!(ids("33"), (33, 34, vec![10, 44], "/var/www".into()));
        assert_eq!(ids("4000"), (4000, 0, vec![], "/".into()));
        assert_eq!(ids("1001").0, 7, "a name that looks like a number is a name");
        assert_eq!(ids("nohome").3, "/");
    }

    #[test]
    fn a_group_named_replaces_the_others() {
        assert_eq!(ids("www:video"), (33, 44, vec![], "/var/www".into()));
        assert_eq!(ids("www:99"), (33, 99, vec![], "/var/www".into()));
        assert_eq!(ids(":26"), (0, 26, vec![], "/root".into()));
        assert_eq!(ids("www:").1, 34);
    }

    #[test]
    fn further_groups_are_added_once() {
        let user = resolve("www", &["tape".into(), "26".into(), "34".into()], PASSWD, GROUP).unwrap();
        assert_eq!(user.additional, [10, 26, 44]);
    }

    #[test]
    fn unknown_names_have_dockers_sentences() {
        let message = |wanted: &str| resolve(wanted, &[], PASSWD, GROUP).unwrap_err().message;
        assert_eq!(message("ghost"), "unable to find user ghost: no matching entries in passwd file");
        let more = resolve("www", &["ghost".into()], PASSWD, GROUP).unwrap_err().message;
        assert_eq!(more, "Unable to find group ghost: no matching entries in group file");
        assert_eq!(message("www:ghost"), "unable to find group ghost: no matching entries in group file");
        assert_eq!(message("4294967295"), "uids and gids must be in range 0-2147483647");
        assert_eq!(message("www:4294967296"), "uids and gids must be in range 0-2147483647");
    }
}
