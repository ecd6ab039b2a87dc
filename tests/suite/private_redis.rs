//! A Redis that nobody else uses: for what would disturb the other tests.

use std::process::{Child, Command, Stdio};

use redis::aio::MultiplexedConnection;
use tempfile::TempDir;

use crate::harness::{eventually, redis_connection, server};

/// A server with a socket in a folder of its own; ended when dropped.
pub(crate) struct PrivateRedis {
    process: Child,
    pub(crate) folder: TempDir,
}

impl PrivateRedis {
    pub(crate) async fn start() -> Self {
        Self::start_with(&[]).await
    }

    pub(crate) async fn start_with(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let process = Command::new(server("COMPOSITE_START_TEST_REDIS_SERVER"))
            .args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket", "socket", "--dir"])
            .arg(folder.path())
            .args(arguments)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let server = Self { process, folder };
        eventually("a private Redis", async || redis_connection(&server.url()).await.ok()).await;
        server
    }

    pub(crate) fn url(&self) -> String {
        format!("redis+unix://{}", self.folder.path().join("socket").display())
    }

    pub(crate) async fn connection(&self) -> MultiplexedConnection {
        redis_connection(&self.url()).await.unwrap()
    }

    pub(crate) async fn does(&self, command: &[&str]) -> redis::Value {
        redis::cmd(command[0]).arg(&command[1..]).query_async(&mut self.connection().await).await.unwrap()
    }
}

impl Drop for PrivateRedis {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
