//! What a package installs beside the program: completions for a shell, and manual pages. Both are made from the arguments
//! themselves, so they cannot be wrong about them.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Command;
use clap_complete::Shell;
use clap_complete::aot::Generator;

/// What could not be written.
#[derive(Debug, thiserror::Error)]
pub enum PapersError {
    /// Standard output is gone.
    #[error("standard output: {0}")]
    Output(#[source] io::Error),
    /// The folder for the pages cannot be made, or not be written to.
    #[error("{}: {source}", folder.display())]
    Folder {
        /// As it was given.
        folder: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

/// Prints what `shell` needs to complete the arguments of `program`.
pub fn completions(mut program: Command, shell: Shell, output: &mut impl Write) -> Result<(), PapersError> {
    let name = program.get_name().to_owned();
    program.set_bin_name(name);
    program.build();
    shell.try_generate(&program, output).map_err(PapersError::Output)
}

/// Writes a page for `program` and one for each of its commands into `folder`, which is made where it is missing.
pub fn manual(program: Command, folder: &Path) -> Result<(), PapersError> {
    fs::create_dir_all(folder)
        .and_then(|()| clap_mangen::generate_to(program, folder))
        .map_err(|source| PapersError::Folder { folder: folder.to_owned(), source })
}
