use flint_api::guest::{ConfigMap, Mount, Process, Secret};

use super::*;

fn materials() -> Materials {
    let config = ConfigMap {
        data: [("level", "debug"), ("color", "red")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
        binary_data: [("blob".to_owned(), vec![0xff])].into(),
    };
    let secret = Secret {
        data: [
            ("password".to_owned(), b"hunter2".to_vec()),
            ("level".to_owned(), b"secret".to_vec()),
        ]
        .into(),
    };
    let blob = Secret {
        data: [("blob".to_owned(), vec![0xff])].into(),
    };
    Materials {
        config_maps: [("config".to_owned(), config)].into(),
        secrets: [("login".to_owned(), secret), ("blob".to_owned(), blob)].into(),
        ..Materials::default()
    }
}

fn from(name: &str, secret: bool, prefix: &str, optional: bool) -> EnvFrom {
    EnvFrom {
        prefix: prefix.to_owned(),
        name: name.to_owned(),
        secret,
        optional,
    }
}

fn variable(name: &str, source: Source) -> EnvVar {
    EnvVar {
        name: name.to_owned(),
        source: Some(source),
    }
}

fn value(name: &str, value: &str) -> EnvVar {
    variable(name, Source::Value(value.to_owned()))
}

fn key(name: &str, key: &str, optional: bool) -> KeyRef {
    KeyRef {
        name: name.to_owned(),
        key: key.to_owned(),
        optional,
    }
}

fn resolved(from: Vec<EnvFrom>, variables: Vec<EnvVar>) -> Result<Vec<String>> {
    let environment = Environment {
        namespace: "default".to_owned(),
        from,
        variables,
        expand_args_from: 0,
    };
    let mut request = CreateContainerRequest {
        environment: Some(environment),
        process: Some(Process::default()),
        ..CreateContainerRequest::default()
    };
    apply(&mut request, &materials())?;
    Ok(request.process.unwrap_or_default().env)
}

#[test]
fn env_from_comes_first_and_env_overrides_it() {
    let env = resolved(
        vec![
            from("config", false, "", false),
            from("login", true, "", false),
            from("config", false, "C_", false),
        ],
        vec![value("color", "blue"), value("SEEN", "$(level) $(color) $(C_color)")],
    );
    // The later source of level wins; the object's keys come in their order, binary ones are files only.
    let expected = [
        "color=blue",
        "level=secret",
        "password=hunter2",
        "C_color=red",
        "C_level=debug",
        "SEEN=secret blue red",
    ];
    assert_eq!(env.unwrap(), expected);
}

#[test]
fn a_variable_sees_those_before_it_only() {
    let env = resolved(
        Vec::new(),
        vec![
            value("A", "$(B)"),
            value("B", "1"),
            value("C", "$(B)$(A)"),
            value("B", "$(B)2"),
            value("D", "$$(B) $(B)"),
        ],
    );
    assert_eq!(env.unwrap(), ["A=$(B)", "B=12", "C=1$(B)", "D=$(B) 12"]);
}

#[test]
fn what_comes_from_an_object_is_not_expanded_again() {
    let env = resolved(
        Vec::new(),
        vec![
            value("A", "1"),
            variable("L", Source::Literal("$(A)".to_owned())),
            variable("P", Source::SecretKey(key("login", "password", false))),
        ],
    );
    assert_eq!(env.unwrap(), ["A=1", "L=$(A)", "P=hunter2"]);
}

#[test]
fn what_is_missing_is_said_in_kubernetes_words_unless_it_is_optional() {
    let of_map = |key_ref| vec![variable("V", Source::ConfigMapKey(key_ref))];
    let of_secret = |key_ref| vec![variable("V", Source::SecretKey(key_ref))];
    let cases = [
        (
            vec![from("nope", false, "", false)],
            vec![],
            "configmap \"nope\" not found",
        ),
        (vec![from("nope", true, "", false)], vec![], "secret \"nope\" not found"),
        (vec![], of_map(key("nope", "k", false)), "configmap \"nope\" not found"),
        (vec![], of_secret(key("nope", "k", false)), "secret \"nope\" not found"),
        (
            vec![],
            of_map(key("config", "k", false)),
            "couldn't find key k in ConfigMap default/config",
        ),
        (
            vec![],
            of_secret(key("login", "k", false)),
            "couldn't find key k in Secret default/login",
        ),
        (
            vec![],
            of_secret(key("blob", "blob", false)),
            "key blob of secret \"blob\" is not UTF-8 text: mount it as a file",
        ),
    ];
    for (from, variables, message) in cases {
        assert_eq!(resolved(from, variables).unwrap_err().0, message);
    }
    let optional = resolved(
        vec![from("nope", false, "", true), from("nope", true, "", true)],
        [
            of_map(key("nope", "k", true)),
            of_map(key("config", "k", true)),
            of_secret(key("login", "k", true)),
        ]
        .concat(),
    );
    assert_eq!(optional.unwrap(), [""; 0]);
}

#[test]
fn arguments_of_the_pod_are_expanded_and_those_of_the_image_are_not() {
    let mut request = CreateContainerRequest {
        process: Some(Process {
            args: ["entry", "$(A)", "$(A)", "$(PATH)"].map(str::to_owned).to_vec(),
            env: vec!["PATH=/image".to_owned()],
            ..Process::default()
        }),
        environment: Some(Environment {
            variables: vec![value("A", "1")],
            expand_args_from: 2,
            ..Environment::default()
        }),
        ..CreateContainerRequest::default()
    };
    apply(&mut request, &materials()).unwrap();
    let process = request.process.unwrap();
    assert_eq!(process.args, ["entry", "$(A)", "1", "$(PATH)"]);
    assert_eq!(process.env, ["PATH=/image", "A=1"]);
}

#[test]
fn sub_paths_are_expanded_and_must_stay_below() {
    let with = |expression: &str, name: &str| {
        let mut request = CreateContainerRequest {
            environment: Some(Environment {
                variables: vec![value("POD", name)],
                ..Environment::default()
            }),
            mounts: vec![Mount {
                sub_path: expression.to_owned(),
                expand_sub_path: true,
                ..Mount::default()
            }],
            ..CreateContainerRequest::default()
        };
        apply(&mut request, &materials()).map(|()| request.mounts.remove(0).sub_path)
    };
    assert_eq!(with("logs/$(POD)", "web"), Ok("logs/web".to_owned()));
    for (expression, name) in [("$(POD)", "../../etc"), ("$(POD)", "/etc"), ("a/$(POD)/b", "..")] {
        assert!(
            with(expression, name).unwrap_err().0.contains("without '..'"),
            "{expression} {name}"
        );
    }
    let missing = with("$(NOPE)", "").unwrap_err();
    assert!(missing.0.contains("missing value for \"NOPE\""), "{missing}");
}

#[test]
fn no_chain_of_references_makes_pid_1_run_out_of_memory() {
    let mut variables = vec![value("V0", &"x".repeat(1000))];
    variables.extend((1..64).map(|n| value(&format!("V{n}"), &format!("$(V{0})$(V{0})", n - 1))));
    let error = resolved(Vec::new(), variables).unwrap_err();
    assert!(error.0.contains("128 KiB"), "{error}");
    let long = "x".repeat(100 << 10);
    let many = (0..1000).map(|n| value(&format!("V{n}"), &long)).collect();
    assert!(resolved(Vec::new(), many).unwrap_err().0.contains("together"));
}
