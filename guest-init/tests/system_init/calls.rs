//! What tests ask of flint-init, as one call each.

use flint_api::guest::*;

use crate::guest::Client;

pub fn shell(script: &str) -> Process {
    Process {
        args: vec!["sh".into(), "-c".into(), script.into()],
        ..Process::default()
    }
}

pub fn container(id: &str, process: Process) -> CreateContainerRequest {
    CreateContainerRequest {
        container_id: id.into(),
        image_id: "busybox".into(),
        process: Some(process),
        scratch_serial: "scratch".into(),
        ..CreateContainerRequest::default()
    }
}

pub async fn create_and_start(client: &mut Client, request: CreateContainerRequest) {
    let container_id = request.container_id.clone();
    client.create_container(request).await.unwrap();
    client
        .start_container(StartContainerRequest { container_id })
        .await
        .unwrap();
}

pub async fn wait(client: &mut Client, id: &str) -> ContainerExit {
    client
        .wait_container(WaitContainerRequest {
            container_id: id.into(),
        })
        .await
        .unwrap()
        .into_inner()
}

pub async fn delete(client: &mut Client, id: &str) {
    client
        .delete_container(DeleteContainerRequest {
            container_id: id.into(),
        })
        .await
        .unwrap();
}

pub async fn delete_ended(client: &mut Client, id: &str) {
    wait(client, id).await;
    delete(client, id).await;
}

/// Creates, runs and deletes a container.
pub async fn run(client: &mut Client, request: CreateContainerRequest) -> (ContainerExit, String, String) {
    let id = request.container_id.clone();
    create_and_start(client, request).await;
    let (out, err) = output(client, &id).await;
    let exit = wait(client, &id).await;
    delete(client, &id).await;
    (
        exit,
        String::from_utf8_lossy(&out).into_owned(),
        String::from_utf8_lossy(&err).into_owned(),
    )
}

/// All output, acknowledged as it is read: standard output, standard error.
pub async fn output(client: &mut Client, id: &str) -> (Vec<u8>, Vec<u8>) {
    let (mut out, mut err, mut from_offset) = (Vec::new(), Vec::new(), 0);
    loop {
        let request = ReadOutputRequest {
            container_id: id.into(),
            from_offset,
        };
        let mut stream = client.read_output(request).await.unwrap().into_inner();
        let before = from_offset;
        while let Some(chunk) = stream.message().await.unwrap() {
            assert_eq!(chunk.offset, from_offset);
            from_offset += chunk.data.len() as u64;
            let to = if chunk.stream() == output_chunk::Stream::Stderr {
                &mut err
            } else {
                &mut out
            };
            to.extend(chunk.data);
        }
        if from_offset == before {
            return (out, err);
        }
    }
}

/// Waits until the container has said something.
pub async fn first_output(client: &mut Client, id: &str) {
    let request = ReadOutputRequest {
        container_id: id.into(),
        from_offset: 0,
    };
    let mut stream = client.read_output(request).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
}

pub async fn exec(client: &mut Client, frames: Vec<exec_request::Frame>) -> (String, String, ContainerExit) {
    let frames = frames.into_iter().map(|frame| ExecRequest { frame: Some(frame) });
    let mut answers = client
        .exec(tokio_stream::iter(frames.collect::<Vec<_>>()))
        .await
        .unwrap()
        .into_inner();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    loop {
        match answers.message().await.unwrap().unwrap().frame.unwrap() {
            exec_response::Frame::Stdout(data) => out.extend(data),
            exec_response::Frame::Stderr(data) => err.extend(data),
            exec_response::Frame::Exit(exit) => {
                return (
                    String::from_utf8_lossy(&out).into_owned(),
                    String::from_utf8_lossy(&err).into_owned(),
                    exit,
                );
            }
        }
    }
}

pub fn exec_start(id: &str, process: Process) -> exec_request::Frame {
    let terminal_size = Some(TerminalSize { rows: 33, columns: 101 });
    exec_request::Frame::Start(ExecStart {
        container_id: id.into(),
        process: Some(process),
        terminal_size,
    })
}
