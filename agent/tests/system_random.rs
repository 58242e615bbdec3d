//! Random numbers of programs that were started before their pod was forked: which differ in the forks, which repeat, and what a pod's
//! hook does about those. docs/security.md has this as a table.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a helper that cannot go on fails its test"
)]

mod host;

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    fs::File,
};

use host::{Host, LIMIT, image, run, variable};

/// How many forks are compared. `FLINT_TEST_CLONES` is another number.
const CLONES: usize = 3;
/// Forks at a time.
const AT_ONCE: usize = 3;

/// What guest-init/examples/draws.rs is in Rust, with more generators: numbers of the kernel, of OpenSSL, and Python's own.
const PYTHON: &str = r"
import _ssl, os, random, secrets, sys, uuid
held = open('/dev/urandom', 'rb', 0)
for line in sys.stdin:
    if line == 'draw\n':
        drawn = {
            'urandom': os.urandom(16).hex(),
            'held': held.read(16).hex(),
            'secrets': secrets.token_hex(16),
            'uuid4': uuid.uuid4().hex,
            'openssl': _ssl.RAND_bytes(16).hex(),
            'mersenne': '%032x' % random.getrandbits(128),
        }
        print(*('%s=%s' % pair for pair in drawn.items()), flush=True)
    else:
        _ssl.RAND_add(os.urandom(32), 32.0)
        random.seed()
        print('reseeded', flush=True)
";

/// Two of each program: one of each that the pod's hook tells to reseed.
const PROGRAMS: [&str; 4] = ["python-alone", "python-told", "rust-alone", "rust-told"];
/// Each talks by two pipes, which exist before anybody is told that it is up.
const START: &str = "
    mkfifo upload; for p in python-alone python-told rust-alone rust-told; do mkfifo $p.in $p.out; done
    echo up; cat <upload >draws; chmod 755 draws
    for p in alone told; do
        python3 -c \"$PYTHON\" <>python-$p.in 1<>python-$p.out &
        ./draws <>rust-$p.in 1<>rust-$p.out &
    done
    wait";

/// What repeats in programs that nobody tells: generators that keep their numbers in their own memory.
const REPEAT: [&str; 3] = ["python-alone mersenne", "python-alone openssl", "rust-alone thread_rng"];

/// A shell line that tells programs something and prints what each answers.
fn tell(programs: &[&str], what: &str) -> String {
    let programs = programs.join(" ");
    format!("cd /; for p in {programs}; do echo {what} >$p.in; read -r line <$p.out; echo \"$p $line\"; done")
}

/// A pod with the programs, each of which has drawn numbers.
fn start_programs(host: &Host) {
    let json = |value: &str| serde_json::to_string(value).unwrap();
    let told = tell(&["python-told", "rust-told"], "reseed");
    let hook = serde_json::to_string(&["main", "sh", "-c", &told]).unwrap();
    host.apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: programs\n  annotations: {{flint.dev/after-restore: {}}}\nspec:\n  containers:\n  \
         - name: main\n    image: {}\n    workingDir: /\n    command: [sh, -c, {}]\n    env: [{{name: PYTHON, value: {}}}]\n",
        json(&hook),
        image("python:3"),
        json(START),
        json(PYTHON),
    ));
    let (mut follower, lines) = host.follow("programs");
    assert_eq!(lines.recv_timeout(LIMIT).unwrap(), "up");
    follower.kill().unwrap();
    follower.wait().unwrap();
    let draws = variable("FLINT_TEST_DRAWS");
    let mut upload = host.command(["exec", "-i", "programs", "--", "sh", "-c", "cat >/upload"]);
    upload.stdin(File::open(draws).unwrap());
    let uploaded = run(upload);
    assert_eq!(uploaded.code, 0, "{uploaded:?}");
}

/// What the programs of a pod draw, by program and generator.
fn draw(host: &Host, pod: &str) -> BTreeMap<String, String> {
    let said = host.ok(["exec", pod, "--", "sh", "-c", &tell(&PROGRAMS, "draw")]);
    let mut drawn = BTreeMap::new();
    for line in said.lines() {
        let mut words = line.split_whitespace();
        let program = words.next().unwrap();
        for (generator, number) in words.map(|word| word.split_once('=').unwrap()) {
            assert_eq!(number.len(), 32, "{line}");
            drawn.insert(format!("{program} {generator}"), number.to_owned());
        }
    }
    assert_eq!(drawn.len(), 2 * (6 + 2), "{said}");
    drawn
}

#[test]
fn programs_in_forks_draw_other_numbers_of_the_kernel_and_the_same_of_their_own_unless_a_hook_told_them() {
    let clones = env::var("FLINT_TEST_CLONES").map_or(CLONES, |number| number.parse().unwrap());
    let host = Host::start();
    start_programs(&host);
    let mut all = vec![draw(&host, "programs")];
    for made in (0..clones).step_by(AT_ONCE) {
        let count = AT_ONCE.min(clones - made).to_string();
        let names = host.ok(["fork", "programs", "--count", &count]);
        for name in names.lines() {
            all.push(draw(&host, name));
            host.ok(["rm", "--force", name]);
        }
    }
    // It goes on from where they began.
    all.push(draw(&host, "programs"));

    let mut drawn = BTreeSet::new();
    let mut repeated = BTreeSet::new();
    for (generator, number) in all.iter().flatten() {
        if !drawn.insert(number) {
            repeated.insert(generator.as_str());
        }
    }
    println!("{clones} clones: {} numbers; repeated by {repeated:?}", drawn.len());
    assert_eq!(repeated.into_iter().collect::<Vec<_>>(), REPEAT, "{all:#?}");
    for generator in REPEAT {
        let after: BTreeSet<_> = all[1..].iter().map(|numbers| &numbers[generator]).collect();
        assert_eq!(after.len(), 1, "{generator}: all draw the same: {after:?}");
    }
}
