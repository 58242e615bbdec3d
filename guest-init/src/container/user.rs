//! Users as images name them, resolved in the container's own /etc/passwd and /etc/group.
//!
//! Both files come from an image: hostile lines are skipped, never trusted, and cost no more than their length.

use flint_api::guest::User;

/// What a process runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplementary groups, sorted.
    pub additional_gids: Vec<u32>,
    /// Home directory; "/" where passwd names none.
    pub home: String,
}

/// A user that the container does not have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UserError {
    /// Not in passwd and no number.
    #[error("user {0:?} is not in the container's /etc/passwd")]
    NoUser(String),
    /// Not in group and no number.
    #[error("group {0:?} is not in the container's /etc/group")]
    NoGroup(String),
}

struct Account<'a> {
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

/// Resolves `user` in the texts of passwd(5) and group(5).
///
/// As other runtimes do: a name that is in passwd wins over its reading as a number; supplementary groups come from
/// group(5) only for a user found in passwd and only where no group is named; numbers need not exist.
pub fn resolve(user: &User, passwd: &str, group: &str) -> Result<Resolved, UserError> {
    let (user_part, group_part) = match user.name.split_once(':') {
        Some((user_part, group_part)) => (user_part, Some(group_part).filter(|part| !part.is_empty())),
        None => (user.name.as_str(), None),
    };
    let account = match user.uid {
        Some(uid) => by_uid(passwd, uid),
        None => find_account(passwd, user_part)?,
    };
    let uid = match (user.uid, &account) {
        (Some(uid), _) => uid,
        (None, Some(account)) => account.uid,
        // find_account refuses what is neither known nor a number.
        (None, None) => user_part.parse().unwrap_or(0),
    };
    let named_group = group_part.map(|part| find_gid(group, part)).transpose()?;
    let gid = user
        .gid
        .or(named_group)
        .or(account.as_ref().map(|account| account.gid))
        .unwrap_or(0);
    let mut additional_gids = user.additional_gids.clone();
    if let (Some(account), None, None) = (&account, named_group, user.gid) {
        additional_gids.extend(
            groups(group)
                .filter(|group| has_member(group, account.name))
                .map(|group| group.gid),
        );
    }
    additional_gids.sort_unstable();
    additional_gids.dedup();
    let home = account
        .map(|account| account.home)
        .filter(|home| home.starts_with('/'))
        .unwrap_or("/");
    Ok(Resolved {
        uid,
        gid,
        additional_gids,
        home: home.to_owned(),
    })
}

fn find_account<'a>(passwd: &'a str, user: &str) -> Result<Option<Account<'a>>, UserError> {
    let user = if user.is_empty() { "0" } else { user };
    if let Some(account) = accounts(passwd).find(|account| account.name == user) {
        return Ok(Some(account));
    }
    let uid = user.parse().map_err(|_| UserError::NoUser(user.to_owned()))?;
    Ok(by_uid(passwd, uid))
}

fn by_uid(passwd: &str, uid: u32) -> Option<Account<'_>> {
    accounts(passwd).find(|account| account.uid == uid)
}

fn find_gid(group: &str, name: &str) -> Result<u32, UserError> {
    match groups(group).find(|group| group.name == name) {
        Some(group) => Ok(group.gid),
        None => name.parse().map_err(|_| UserError::NoGroup(name.to_owned())),
    }
}

fn has_member(group: &Group<'_>, name: &str) -> bool {
    group.members.split(',').any(|member| member == name)
}

/// name:password:uid:gid:comment:home:shell
fn accounts(passwd: &str) -> impl Iterator<Item = Account<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).unwrap_or("");
        Some(Account { name, uid, gid, home })
    })
}

/// name:password:gid:member,member
fn groups(group: &str) -> impl Iterator<Item = Group<'_>> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = fields.nth(1)?.parse().ok()?;
        let members = fields.next().unwrap_or("");
        Some(Group { name, gid, members })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:App:/home/app:/bin/sh\n1234:x:77:78::/home/digits:\n";
    const GROUP: &str = "root:x:0:\napp:x:1001:\naudio:x:29:app,other\nvideo:x:44:other,app\nother:x:50:applause\n";

    fn named(name: &str) -> User {
        User {
            name: name.into(),
            ..User::default()
        }
    }

    fn resolve_name(name: &str) -> Result<Resolved, UserError> {
        resolve(&named(name), PASSWD, GROUP)
    }

    #[test]
    fn an_empty_name_is_root_at_home() {
        let root = resolve_name("").unwrap();
        assert_eq!((root.uid, root.gid, root.home.as_str()), (0, 0, "/root"));
    }

    #[test]
    fn a_name_brings_its_group_home_and_memberships() {
        let app = resolve_name("app").unwrap();
        assert_eq!(
            app,
            Resolved {
                uid: 1000,
                gid: 1001,
                additional_gids: vec![29, 44],
                home: "/home/app".into()
            }
        );
        assert_eq!(resolve_name("1000").unwrap(), app);
    }

    #[test]
    fn a_named_group_replaces_memberships() {
        let app = resolve_name("app:audio").unwrap();
        assert_eq!((app.gid, app.additional_gids), (29, vec![]));
        assert_eq!(resolve_name("app:555").unwrap().gid, 555);
        assert_eq!(resolve_name("app:").unwrap().gid, 1001);
    }

    #[test]
    fn a_name_of_digits_in_passwd_wins_over_the_number() {
        assert_eq!(resolve_name("1234").unwrap().uid, 77);
    }

    #[test]
    fn unknown_numbers_are_fine_and_unknown_names_are_not() {
        let nobody = resolve_name("4000").unwrap();
        assert_eq!((nobody.uid, nobody.gid, nobody.home.as_str()), (4000, 0, "/"));
        assert_eq!(resolve_name("ghost").unwrap_err(), UserError::NoUser("ghost".into()));
        assert_eq!(
            resolve_name("app:ghosts").unwrap_err(),
            UserError::NoGroup("ghosts".into())
        );
        assert!(resolve_name("-1").is_err() && resolve_name("4294967296").is_err());
    }

    #[test]
    fn the_pod_overrides_the_image() {
        let user = User {
            uid: Some(1000),
            gid: Some(5),
            additional_gids: vec![9, 9, 3],
            ..named("root")
        };
        let resolved = resolve(&user, PASSWD, GROUP).unwrap();
        assert_eq!(
            (resolved.uid, resolved.gid, resolved.additional_gids),
            (1000, 5, vec![3, 9])
        );
        assert_eq!(resolved.home, "/home/app");
        // An override makes the image's unknown name irrelevant.
        assert_eq!(
            resolve(
                &User {
                    uid: Some(7),
                    ..named("ghost")
                },
                "",
                ""
            )
            .unwrap()
            .uid,
            7
        );
    }

    #[test]
    fn hostile_files_are_skipped_line_by_line() {
        let passwd = format!(
            "\n:::::\n:x:0:0:::\nx\nx:y\nevil:x:-1:0:::\nevil:x:99999999999:0:::\nevil:x:1:\u{0}:::\n{}\napp:x:1000:1001\n",
            "a".repeat(100_000)
        );
        let app = resolve(&named("app"), &passwd, ":::\nx:y\n:x:3:app\nbad:x:z:app\n").unwrap();
        assert_eq!(
            app,
            Resolved {
                uid: 1000,
                gid: 1001,
                additional_gids: vec![],
                home: "/".into()
            }
        );
        assert!(resolve(&named("evil"), &passwd, "").is_err());
    }

    #[test]
    fn a_home_that_is_no_path_is_not_used() {
        assert_eq!(resolve(&named("x"), "x:x:5:5::../../etc:\n", "").unwrap().home, "/");
    }
}
