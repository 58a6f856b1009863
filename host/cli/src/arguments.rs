//! The command line as it is typed. Names, short flags and defaults are Docker's where Docker has the command.

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

/// Containers on your desktop.
#[derive(Debug, Parser)]
#[command(name = "engine", version, disable_version_flag = true, disable_help_subcommand = true)]
#[command(after_help = "The first command that needs the machine boots it.")]
pub(crate) struct Cli {
    /// Talk to this Docker API socket (unix:///…) instead of the machine's
    #[arg(short = 'H', long, global = true, env = "ENGINE_HOST", value_name = "SOCKET")]
    pub(crate) host: Option<String>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create and run a new container from an image
    #[command(disable_help_flag = true)]
    Run(Box<crate::run::raw::RawRunArgs>),
    /// Create a new container
    #[command(disable_help_flag = true)]
    Create(Box<crate::run::raw::RawRunArgs>),
    /// Attach local standard input, output, and error streams to a running container
    Attach(AttachArgs),
    /// Copy files/folders between a container and the local filesystem
    Cp(CpArgs),
    /// Execute a command in a running container
    Exec(ExecArgs),
    /// List containers
    #[command(visible_alias = "ls")]
    Ps(PsArgs),
    /// Fetch the logs of a container
    Logs(LogsArgs),
    /// Start one or more stopped containers
    Start(ContainersArgs),
    /// Stop one or more running containers
    Stop(StopArgs),
    /// Restart one or more containers
    Restart(StopArgs),
    /// Kill one or more running containers
    Kill(KillArgs),
    /// Block until containers stop, then print their exit codes
    Wait(ContainersArgs),
    /// Remove one or more containers
    Rm(RmArgs),
    /// Pause all processes within one or more containers
    Pause(ContainersArgs),
    /// Unpause all processes within one or more containers
    Unpause(ContainersArgs),
    /// Rename a container
    Rename {
        /// The container
        container: String,
        /// Its new name
        name: String,
    },
    /// Find out what is between you and a container
    #[command(subcommand)]
    Net(NetCommand),
    /// List port mappings of a container
    Port {
        /// The container
        container: String,
        /// Only this port of it
        #[arg(value_name = "PORT[/PROTOCOL]")]
        port: Option<String>,
    },
    /// Display the running processes of a container
    Top {
        /// The container, then options of ps
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_names = ["CONTAINER", "PS_OPTIONS"])]
        words: Vec<String>,
    },
    /// Display a live stream of container(s) resource usage statistics
    Stats(StatsArgs),
    /// Inspect changes to files on a container's filesystem
    Diff {
        /// The container
        container: String,
    },
    /// Create a new image from a container's changes
    Commit(CommitArgs),
    /// Save one or more images to a tar archive
    Save {
        /// Write to a file, instead of STDOUT
        #[arg(short, long, value_name = "FILE")]
        output: Option<std::path::PathBuf>,
        /// The images
        #[arg(required = true)]
        images: Vec<String>,
    },
    /// Export a container's filesystem as a tar archive
    Export {
        /// Write to a file, instead of STDOUT
        #[arg(short, long, value_name = "FILE")]
        output: Option<std::path::PathBuf>,
        /// The container
        container: String,
    },
    /// Manage volumes
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Manage networks
    #[command(subcommand)]
    Network(NetworkCommand),
    /// List images
    Images(ImagesArgs),
    /// Download an image from a registry
    Pull(PullArgs),
    /// Upload an image to a registry
    Push(PushArgs),
    /// Show the history of an image
    History(HistoryArgs),
    /// Load an image from a tar archive or standard input
    Load(LoadArgs),
    /// Create a tag TARGET that refers to SOURCE
    Tag(TagArgs),
    /// Remove one or more images
    Rmi(RmiArgs),
    /// Return low-level information on containers and images
    Inspect(InspectArgs),
    /// Get real time events from the engine
    Events(EventsArgs),
    /// Show the version information
    Version(FormatArgs),
    /// Display system-wide information
    Info(FormatArgs),
    /// The virtual machine that containers run in
    #[command(subcommand)]
    Machine(MachineCommand),
    /// Print what to add to the shell's environment
    Env(EnvArgs),
    /// Print a completion script for a shell
    Completion {
        /// The shell
        shell: Shell,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    /// Detached mode: run command in the background
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Set environment variables
    #[arg(short, long = "env", value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// Keep STDIN open even if not attached
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give extended privileges to the command
    #[arg(long)]
    pub(crate) privileged: bool,
    /// Allocate a pseudo-TTY
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Username or UID (format: "<name|uid>[:<group|gid>]")
    #[arg(short, long, default_value = "", hide_default_value = true)]
    pub(crate) user: String,
    /// Working directory inside the container
    #[arg(short, long, default_value = "", hide_default_value = true)]
    pub(crate) workdir: String,
    /// The container, then the command and its arguments
    #[arg(required = true, num_args = 2.., trailing_var_arg = true, allow_hyphen_values = true, value_names = ["CONTAINER", "COMMAND"])]
    pub(crate) words: Vec<String>,
}

impl ExecArgs {
    pub(crate) fn container(&self) -> &str {
        self.words.first().map_or("", String::as_str)
    }

    pub(crate) fn command(&self) -> &[String] {
        self.words.get(1..).unwrap_or_default()
    }
}

#[derive(Debug, Args)]
pub(crate) struct AttachArgs {
    /// Do not attach STDIN
    #[arg(long)]
    pub(crate) no_stdin: bool,
    /// Proxy all received signals to the process
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub(crate) sig_proxy: bool,
    /// The container
    pub(crate) container: String,
}

#[derive(Debug, Args)]
pub(crate) struct CpArgs {
    /// Archive mode (copy all uid/gid information)
    #[arg(short, long)]
    pub(crate) archive: bool,
    /// Always follow symbol link in SRC_PATH
    #[arg(short = 'L', long)]
    pub(crate) follow_link: bool,
    /// Suppress progress output during copy
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// `CONTAINER:PATH`, a path of this computer, or `-` for an archive on standard input
    #[arg(value_name = "SRC_PATH")]
    pub(crate) source: String,
    /// `CONTAINER:PATH`, a path of this computer, or `-` for an archive on standard output
    #[arg(value_name = "DEST_PATH")]
    pub(crate) target: String,
}

#[derive(Debug, Args)]
pub(crate) struct StatsArgs {
    /// Show all containers (default shows just running)
    #[arg(short, long)]
    pub(crate) all: bool,
    /// `json`, `table TEMPLATE` or a template such as `{{.CPUPerc}}`
    #[arg(long)]
    pub(crate) format: Option<String>,
    /// Disable streaming stats and only pull the first result
    #[arg(long)]
    pub(crate) no_stream: bool,
    /// Don't truncate output
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// The containers; all that run if there are none
    pub(crate) containers: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// Show all containers (default shows just running)
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Show n last created containers (includes all states)
    #[arg(short = 'n', long, value_name = "N")]
    pub(crate) last: Option<u32>,
    /// Show the latest created container (includes all states)
    #[arg(short, long)]
    pub(crate) latest: bool,
    /// Don't truncate output
    #[arg(long)]
    pub(crate) no_trunc: bool,
    #[command(flatten)]
    pub(crate) listing: ListArgs,
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// Follow log output
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Show logs since timestamp or relative (e.g. "42m" for 42 minutes)
    #[arg(long)]
    pub(crate) since: Option<String>,
    /// Show logs before a timestamp or relative
    #[arg(long)]
    pub(crate) until: Option<String>,
    /// Number of lines to show from the end of the logs
    #[arg(short = 'n', long, default_value = "all")]
    pub(crate) tail: String,
    /// Show timestamps
    #[arg(short, long)]
    pub(crate) timestamps: bool,
    /// The container
    pub(crate) container: String,
}

#[derive(Debug, Args)]
pub(crate) struct ContainersArgs {
    /// The containers
    #[arg(required = true)]
    pub(crate) containers: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    /// Signal to send to the container
    #[arg(short, long)]
    pub(crate) signal: Option<String>,
    /// Seconds to wait before killing the container
    #[arg(short = 't', long, alias = "time", allow_hyphen_values = true, value_name = "SECONDS")]
    pub(crate) timeout: Option<i64>,
    #[command(flatten)]
    pub(crate) on: ContainersArgs,
}

#[derive(Debug, Args)]
pub(crate) struct KillArgs {
    /// Signal to send to the container
    #[arg(short, long)]
    pub(crate) signal: Option<String>,
    #[command(flatten)]
    pub(crate) on: ContainersArgs,
}

#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Force the removal of a running container (uses SIGKILL)
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Remove anonymous volumes associated with the container
    #[arg(short, long)]
    pub(crate) volumes: bool,
    #[command(flatten)]
    pub(crate) on: ContainersArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ImagesArgs {
    /// Show all images (default hides intermediate images)
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Show digests
    #[arg(long)]
    pub(crate) digests: bool,
    /// Don't truncate output
    #[arg(long)]
    pub(crate) no_trunc: bool,
    #[command(flatten)]
    pub(crate) listing: ListArgs,
    /// Only this repository, or this image
    #[arg(value_name = "REPOSITORY[:TAG]")]
    pub(crate) reference: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// Set platform
    #[arg(long)]
    pub(crate) platform: Option<String>,
    /// Suppress verbose output
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// The image
    #[arg(value_name = "NAME[:TAG|@DIGEST]")]
    pub(crate) image: String,
}

#[derive(Debug, Args)]
pub(crate) struct PushArgs {
    /// Push all tags of an image to the repository
    #[arg(short, long)]
    pub(crate) all_tags: bool,
    /// Suppress verbose output
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// The image
    #[arg(value_name = "NAME[:TAG]")]
    pub(crate) image: String,
}

#[derive(Debug, Args)]
pub(crate) struct HistoryArgs {
    /// `json`, `table TEMPLATE` or a template such as `{{.CreatedBy}}`
    #[arg(long)]
    pub(crate) format: Option<String>,
    /// Don't truncate output
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// Only show image IDs
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// The image
    pub(crate) image: String,
}

#[derive(Debug, Args)]
pub(crate) struct LoadArgs {
    /// Read from tar archive file, instead of STDIN
    #[arg(short, long, value_name = "FILE")]
    pub(crate) input: Option<std::path::PathBuf>,
    /// Suppress the load output
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct TagArgs {
    /// The image
    #[arg(value_name = "SOURCE_IMAGE[:TAG]")]
    pub(crate) source: String,
    /// Its new name
    #[arg(value_name = "TARGET_IMAGE[:TAG]")]
    pub(crate) target: String,
}

#[derive(Debug, Args)]
pub(crate) struct RmiArgs {
    /// Force removal of the image
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Do not delete untagged parents
    #[arg(long)]
    pub(crate) no_prune: bool,
    /// The images
    #[arg(required = true)]
    pub(crate) images: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// `json` or a template such as `{{.State.Status}}`
    #[arg(short, long)]
    pub(crate) format: Option<String>,
    /// Only objects of this type
    #[arg(long = "type", value_name = "TYPE")]
    pub(crate) kind: Option<ObjectKind>,
    /// Names or ids
    #[arg(required = true)]
    pub(crate) names: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ObjectKind {
    Container,
    Image,
    Network,
    Volume,
}

#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    /// Filter output based on conditions provided
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub(crate) filter: Vec<String>,
    /// `json` or a template such as `{{.Action}}`
    #[arg(long)]
    pub(crate) format: Option<String>,
    /// Show all events created since timestamp
    #[arg(long)]
    pub(crate) since: Option<String>,
    /// Stream events until this timestamp
    #[arg(long)]
    pub(crate) until: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct FormatArgs {
    /// `json` or a template such as `{{.ServerVersion}}`
    #[arg(short, long)]
    pub(crate) format: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct EnvArgs {
    /// Print only the value for DOCKER_HOST
    #[arg(long)]
    pub(crate) socket: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CommitArgs {
    /// Author
    #[arg(short, long, default_value = "", hide_default_value = true)]
    pub(crate) author: String,
    /// Apply Dockerfile instruction to the created image
    #[arg(short, long, value_name = "INSTRUCTION")]
    pub(crate) change: Vec<String>,
    /// Commit message
    #[arg(short, long, default_value = "", hide_default_value = true)]
    pub(crate) message: String,
    /// The container
    pub(crate) container: String,
    /// The image's name
    #[arg(value_name = "REPOSITORY[:TAG]")]
    pub(crate) image: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Create a volume
    Create {
        /// Set metadata for a volume
        #[arg(long, value_name = "NAME[=VALUE]")]
        label: Vec<String>,
        /// Set driver specific options
        #[arg(short, long, value_name = "NAME=VALUE")]
        opt: Vec<String>,
        /// Its name; a random one if there is none
        name: Option<String>,
    },
    /// Display detailed information on one or more volumes
    Inspect(NamesArgs),
    /// List volumes
    #[command(visible_alias = "list")]
    Ls(ListArgs),
    /// Remove unused local volumes
    Prune(PruneArgs),
    /// Remove one or more volumes
    #[command(visible_alias = "remove")]
    Rm(NamesArgs),
}

#[derive(Debug, Subcommand)]
pub(crate) enum NetCommand {
    /// Walk the way to a container or port, and print the first broken link with its cure
    Why {
        /// A container, a port of it (`web:80`, `dns:53/udp`), or a port of this computer (`8080`, `localhost:8080`)
        target: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum NetworkCommand {
    /// Connect a container to a network
    Connect {
        /// Add network-scoped alias for the container
        #[arg(long, value_name = "NAME")]
        alias: Vec<String>,
        /// IPv4 address
        #[arg(long, value_name = "ADDRESS")]
        ip: Option<String>,
        /// The network
        network: String,
        /// The container
        container: String,
    },
    /// Create a network
    Create(NetworkCreateArgs),
    /// Disconnect a container from a network
    Disconnect {
        /// Force the container to disconnect
        #[arg(short, long)]
        force: bool,
        /// The network
        network: String,
        /// The container
        container: String,
    },
    /// Display detailed information on one or more networks
    Inspect(NamesArgs),
    /// List networks
    #[command(visible_alias = "list")]
    Ls(ListArgs),
    /// Remove all unused networks
    Prune(PruneArgs),
    /// Remove one or more networks
    #[command(visible_alias = "remove")]
    Rm(NamesArgs),
}

#[derive(Debug, Args)]
pub(crate) struct NetworkCreateArgs {
    /// Driver to manage the network
    #[arg(short, long, default_value = "bridge")]
    pub(crate) driver: String,
    /// Gateway of the subnet
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) gateway: Option<String>,
    /// Restrict external access to the network
    #[arg(long)]
    pub(crate) internal: bool,
    /// Allocate addresses from a part of the subnet
    #[arg(long, value_name = "RANGE")]
    pub(crate) ip_range: Option<String>,
    /// Enable IPv6
    #[arg(long)]
    pub(crate) ipv6: bool,
    /// Set metadata on a network
    #[arg(long, value_name = "NAME[=VALUE]")]
    pub(crate) label: Vec<String>,
    /// Set driver specific options
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub(crate) opt: Vec<String>,
    /// Subnet as address and prefix length
    #[arg(long, value_name = "SUBNET")]
    pub(crate) subnet: Vec<String>,
    /// Its name
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct NamesArgs {
    /// Their names
    #[arg(required = true)]
    pub(crate) names: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Filter output based on conditions provided
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub(crate) filter: Vec<String>,
    /// `json`, `table TEMPLATE` or a template such as `{{.Name}}`
    #[arg(long)]
    pub(crate) format: Option<String>,
    /// Only display names (volumes) or IDs
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PruneArgs {
    /// Filter what is removed
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) filter: Vec<String>,
    /// Do not ask
    #[arg(short, long)]
    pub(crate) force: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum MachineCommand {
    /// Boot the machine
    Start,
    /// Power the machine off; containers are stopped first
    Stop,
    /// Stop, then start
    Restart,
    /// Print `running`, `stopped`, `starting` or `stopping`
    Status(FormatArgs),
    /// Print what the machine is, what runs it, and why
    Info(FormatArgs),
    /// Change the machine's size, or what runs it; a running machine takes on what it can
    Set {
        /// cpus=4, memory=8g, disk=128g (it never shrinks), backend=auto|kvm|qemu
        #[arg(required = true, value_name = "NAME=VALUE")]
        settings: Vec<String>,
    },
    /// Print the machine's logs
    Logs {
        /// Keep printing what is appended
        #[arg(short, long)]
        follow: bool,
        /// The guest agent's and the engine's log instead of the console
        #[arg(long, conflicts_with_all = ["vmm", "daemon"])]
        engine: bool,
        /// The VM process's log instead of the console
        #[arg(long, conflicts_with = "daemon")]
        vmm: bool,
        /// The host daemon's log instead of the console
        #[arg(long)]
        daemon: bool,
    },
    /// Open a root shell in the machine: a privileged container that shares its namespaces, its root at /host
    Shell {
        /// The image that brings the shell
        #[arg(short, long, default_value = "debian")]
        image: String,
        /// The command instead of a shell
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Delete the machine with its images, containers and volumes
    Rm {
        /// Do not ask
        #[arg(short, long)]
        force: bool,
    },
    /// Stop the machine and the host daemon
    Shutdown,
}
