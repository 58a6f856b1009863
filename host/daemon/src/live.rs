//! What a running machine takes on of new settings at once. The rest counts from its next start.

use guest_protocol::{Failure, Request, Response};

use crate::supervisor::{Handle, MemorySize};

/// What became of one setting.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// It holds; how, as a sentence.
    Now(String),
    /// It counts from the next start; why not now, as a clause.
    Later(String),
}

/// Makes the disk of the running machine larger. `Err` says why it is as large as it was, `Ok(Err)` why nobody knows.
pub(crate) async fn grow_disk(supervisor: &Handle, disk_gib: u64) -> Result<Result<(), String>, String> {
    match supervisor.grow_disk(disk_gib << 30).await {
        Ok(outcome) => outcome.map(Ok),
        Err(unknown) => Ok(Err(unknown)),
    }
}

/// Has the running machine use the disk that was made larger. If it cannot, it does when it starts next.
pub(crate) async fn use_disk(supervisor: &Handle, disk_gib: u64) -> Taken {
    disk_taken(disk_gib, supervisor.ask_guest(Request::GrowDisk { size_bytes: disk_gib << 30 }).await)
}

fn disk_taken(disk_gib: u64, answer: Result<Response, Failure>) -> Taken {
    match answer {
        Ok(Response::Disk { total_bytes }) => {
            let mib = total_bytes >> 20;
            Taken::Now(format!("the disk has {disk_gib} GiB now, with room for {mib} MiB of files"))
        }
        other => Taken::Later(unexpected(other)),
    }
}

/// Has the running machine use this much memory. It cannot have less than it was started with.
pub(crate) async fn use_memory(supervisor: &Handle, memory_mib: u32) -> Taken {
    memory_taken(memory_mib, supervisor.set_memory(memory_mib).await.flatten())
}

fn memory_taken(memory_mib: u32, answer: Result<MemorySize, String>) -> Taken {
    let wanted = u64::from(memory_mib);
    match answer {
        // It comes in blocks of 2 MiB.
        Ok(MemorySize { now_mib, .. }) if now_mib == wanted || now_mib == wanted + 1 => {
            Taken::Now(format!("the machine has {now_mib} MiB of memory now"))
        }
        Ok(MemorySize { now_mib, started_mib }) if memory_mib < started_mib => {
            Taken::Later(format!("the machine was started with {started_mib} MiB, and has {now_mib} MiB now"))
        }
        Ok(MemorySize { now_mib, .. }) if now_mib > wanted => Taken::Later(format!(
            "the machine has {now_mib} MiB now, and gives more back when nothing in it needs that any more"
        )),
        Ok(MemorySize { now_mib, .. }) => {
            Taken::Later(format!("the machine has {now_mib} MiB now, and its kernel took no more"))
        }
        Err(why) => Taken::Later(why),
    }
}

/// Has the running machine use so many of its processors. It cannot have more than it was started with.
pub(crate) async fn use_processors(supervisor: &Handle, count: u32) -> Taken {
    processors_taken(count, supervisor.ask_guest(Request::UseProcessors { count }).await)
}

fn processors_taken(count: u32, answer: Result<Response, Failure>) -> Taken {
    match answer {
        Ok(Response::Processors { online, .. }) if online == count => {
            Taken::Now(format!("the machine runs on {} now", cpus(count)))
        }
        Ok(Response::Processors { online, present }) => {
            Taken::Later(format!("the machine was started with {}, and runs on {online}", cpus(present)))
        }
        other => Taken::Later(unexpected(other)),
    }
}

fn cpus(count: u32) -> String {
    match count {
        1 => "1 CPU".to_owned(),
        _ => format!("{count} CPUs"),
    }
}

fn unexpected(answer: Result<Response, Failure>) -> String {
    match answer {
        Ok(response) => format!("the machine answered something else: {response:?}"),
        Err(failure) => format!("the machine could not follow: {failure}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_protocol::FailureKind;

    #[test]
    fn what_the_guest_says_becomes_a_sentence() {
        let disk = |answer| disk_taken(3, answer);
        let room = "the disk has 3 GiB now, with room for 2900 MiB of files";
        assert_eq!(disk(Ok(Response::Disk { total_bytes: 2900 << 20 })), Taken::Now(room.into()));
        let failure = Failure::new(FailureKind::Failed, "resize2fs ended with status 1: no");
        let why = "the machine could not follow: resize2fs ended with status 1: no";
        assert_eq!(disk(Err(failure)), Taken::Later(why.into()));
        assert!(matches!(disk(Ok(Response::Done)), Taken::Later(why) if why.contains("Done")));

        let memory = |wanted, now_mib| memory_taken(wanted, Ok(MemorySize { now_mib, started_mib: 1024 }));
        assert_eq!(memory(2048, 2048), Taken::Now("the machine has 2048 MiB of memory now".into()));
        assert_eq!(memory(2047, 2048), Taken::Now("the machine has 2048 MiB of memory now".into()));
        let later = |wanted, now_mib| match memory(wanted, now_mib) {
            Taken::Later(why) => why,
            Taken::Now(sentence) => panic!("{sentence}"),
        };
        assert_eq!(later(512, 1024), "the machine was started with 1024 MiB, and has 1024 MiB now");
        assert!(later(2048, 3000).starts_with("the machine has 3000 MiB now, and gives more back"));
        assert_eq!(later(2048, 1024), "the machine has 1024 MiB now, and its kernel took no more");
        assert_eq!(memory_taken(1, Err("why".into())), Taken::Later("why".into()));

        let processors =
            |count, online| processors_taken(count, Ok(Response::Processors { online, present: 4 }));
        assert_eq!(processors(1, 1), Taken::Now("the machine runs on 1 CPU now".into()));
        assert_eq!(processors(4, 4), Taken::Now("the machine runs on 4 CPUs now".into()));
        let why = "the machine was started with 4 CPUs, and runs on 4";
        assert_eq!(processors(6, 4), Taken::Later(why.into()));
        assert!(matches!(processors_taken(1, Ok(Response::Done)), Taken::Later(_)));
    }
}
