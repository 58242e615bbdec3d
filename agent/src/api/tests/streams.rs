//! Byte streams of the host API: logs, exec, attach.

use flint_api::host::{self, exec_request, exec_response, pod_status::Phase, streams_client::StreamsClient};
use tokio_stream::StreamExt as _;
use tonic::Code;

use super::{Flintd, pod, reason};

#[tokio::test]
async fn exec_carries_both_ways_half_closes_and_gives_the_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::start(folder.path()).await;
    let (meta, spec) = pod("a");
    flintd.apply(meta, spec).await.unwrap();
    flintd.running("a").await;
    let mut streams = StreamsClient::new(flintd.channel.clone());
    let start = |timeout: bool| {
        exec_request::Frame::Start(host::ExecStart {
            uid: "a".into(),
            command: vec!["cat".into()],
            stdin: true,
            timeout: timeout.then_some(prost_types::Duration {
                seconds: 0,
                nanos: 1_000_000,
            }),
            ..Default::default()
        })
    };
    let frames = [start(false), exec_request::Frame::Stdin(b"hello".to_vec())];
    let frames = frames.map(|frame| host::ExecRequest { frame: Some(frame) });
    let answers = streams.exec(tokio_stream::iter(frames)).await.unwrap().into_inner();
    let answers: Vec<_> = answers.map(|answer| answer.unwrap().frame.unwrap()).collect().await;
    let exit = |exit_code| {
        exec_response::Frame::Exit(host::ExecExit {
            exit_code,
            error: String::new(),
        })
    };
    assert_eq!(answers, [exec_response::Frame::Stdout(b"hello".to_vec()), exit(5)]);

    // Its input stays open, so only the timeout ends it.
    let first = host::ExecRequest {
        frame: Some(start(true)),
    };
    let frames = tokio_stream::once(first).chain(tokio_stream::pending());
    let mut answers = streams.exec(frames).await.unwrap().into_inner();
    let Some(exec_response::Frame::Exit(end)) = answers.message().await.unwrap().unwrap().frame else {
        panic!()
    };
    assert_eq!(end.exit_code, 124);

    let unknown = host::ExecStart {
        uid: "a".into(),
        container: "db".into(),
        command: vec!["x".into()],
        ..Default::default()
    };
    let frame = host::ExecRequest {
        frame: Some(exec_request::Frame::Start(unknown)),
    };
    let status = streams.exec(tokio_stream::once(frame)).await.unwrap_err();
    assert_eq!(reason(&status), "CONTAINER_NOT_FOUND");
    let frame = host::ExecRequest { frame: None };
    assert_eq!(
        streams.exec(tokio_stream::once(frame)).await.unwrap_err().code(),
        Code::InvalidArgument
    );
}

#[tokio::test]
async fn an_attached_client_gets_output_from_now_on_and_the_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::start(folder.path()).await;
    let (meta, spec) = pod("a");
    flintd.apply(meta, spec).await.unwrap();
    flintd.running("a").await;
    let start = host::AttachStart {
        uid: "a".into(),
        ..Default::default()
    };
    let frame = host::AttachRequest {
        frame: Some(host::attach_request::Frame::Start(start)),
    };
    let frames = tokio_stream::once(frame).chain(tokio_stream::pending());
    let mut output = StreamsClient::new(flintd.channel.clone())
        .attach(frames)
        .await
        .unwrap()
        .into_inner();
    flintd.guest.print("web-0", "now\n");
    let first = output.message().await.unwrap().unwrap().frame.unwrap();
    assert_eq!(first, exec_response::Frame::Stdout(b"now\n".to_vec()));
    flintd.guest.exit("web-0", 7);
    let last = output.message().await.unwrap().unwrap().frame.unwrap();
    assert_eq!(
        last,
        exec_response::Frame::Exit(host::ExecExit {
            exit_code: 7,
            error: String::new()
        })
    );
}

#[tokio::test]
async fn a_flintd_that_follows_goes_on_with_running_pods_and_loses_no_output() {
    let folder = tempfile::tempdir().unwrap();
    let first = Flintd::start(folder.path()).await;
    let (meta, spec) = pod("a");
    first.apply(meta, spec).await.unwrap();
    let before = first.running("a").await;
    first.guest.print("web-0", "before\n");
    let request = host::LogsRequest {
        uid: "a".into(),
        follow: true,
        ..Default::default()
    };
    let mut entries = StreamsClient::new(first.channel.clone())
        .logs(request.clone())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(entries.message().await.unwrap().unwrap().line, b"before\n");

    // The state file is copied while the first one has it open: what a kill would leave.
    let second_folder = tempfile::tempdir().unwrap();
    let copied = std::process::Command::new("cp")
        .arg("-a")
        .arg(folder.path().join("."))
        .arg(second_folder.path())
        .status()
        .unwrap();
    assert!(copied.success());
    first.guest.print("web-0", "between\n");
    let second = Flintd::with(second_folder.path(), first.sandboxes.clone()).await;
    let after = second.running("a").await;
    assert!(after.revision >= before.revision);
    second.guest.print("web-0", "after\n");
    second.guest.exit("web-0", 0);
    second.until("a", |status| status.phase() == Phase::Succeeded).await;
    assert_eq!(
        second.sandboxes.plans.lock().unwrap().len(),
        1,
        "no second sandbox was made"
    );
    let entries = StreamsClient::new(second.channel.clone())
        .logs(request)
        .await
        .unwrap()
        .into_inner();
    let lines: Vec<_> = entries.map(|entry| entry.unwrap().line).collect().await;
    assert_eq!(String::from_utf8(lines.concat()).unwrap(), "before\nbetween\nafter\n");
}

#[tokio::test]
async fn an_attached_client_gets_the_last_of_a_flood_before_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::start(folder.path()).await;
    let (meta, spec) = pod("a");
    flintd.apply(meta, spec).await.unwrap();
    flintd.running("a").await;
    let start = host::AttachStart {
        uid: "a".into(),
        ..Default::default()
    };
    let frame = host::AttachRequest {
        frame: Some(host::attach_request::Frame::Start(start)),
    };
    let frames = tokio_stream::once(frame).chain(tokio_stream::pending());
    let output = StreamsClient::new(flintd.channel.clone())
        .attach(frames)
        .await
        .unwrap()
        .into_inner();
    // All of it is in the guest, and the container has ended, before flintd has read any.
    let text = "x".repeat(100_000);
    flintd.guest.print_and_exit("web-0", &text, 0);
    let answers: Vec<_> = output.map(|answer| answer.unwrap().frame.unwrap()).collect().await;
    let (last, before) = answers.split_last().unwrap();
    assert!(matches!(last, exec_response::Frame::Exit(_)), "{last:?}");
    let bytes: usize = before
        .iter()
        .map(|frame| match frame {
            exec_response::Frame::Stdout(bytes) => bytes.len(),
            other => panic!("{other:?}"),
        })
        .sum();
    assert_eq!(bytes, text.len());
}

#[tokio::test]
async fn output_comes_whole_though_the_guest_fails_to_give_it_now_and_then() {
    let folder = tempfile::tempdir().unwrap();
    let flintd = Flintd::start(folder.path()).await;
    let (meta, spec) = pod("a");
    flintd.apply(meta, spec).await.unwrap();
    flintd.running("a").await;
    flintd.guest.fail_readings(3);
    flintd.guest.print_and_exit("web-0", "all of it\n", 0);
    flintd.until("a", |status| status.phase() == Phase::Succeeded).await;
    let request = host::LogsRequest {
        uid: "a".into(),
        ..Default::default()
    };
    let batches = StreamsClient::new(flintd.channel.clone())
        .log_batches(request)
        .await
        .unwrap()
        .into_inner();
    let batches: Vec<_> = batches.map(Result::unwrap).collect().await;
    let lines: Vec<_> = batches
        .iter()
        .flat_map(|batch| &batch.entries)
        .map(|entry| &entry.line)
        .collect();
    assert_eq!(lines, [b"all of it\n"]);
}
