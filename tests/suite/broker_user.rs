//! Logins to the shared broker, with rights of their own.

use std::process::Command;

use crate::harness::{Space, amqp_url, rabbitmqctl, server};

/// A login, one a space; removed when dropped.
pub(crate) struct User {
    pub(crate) name: String,
    password: String,
}

impl User {
    /// One that may do nothing yet.
    pub(crate) async fn new(space: &Space, password: &str) -> Self {
        let user = Self { name: space.key_prefix.clone(), password: password.to_owned() };
        rabbitmqctl(&["add_user", &user.name, password]).await;
        user
    }

    /// What it may configure, write and read: the regular expressions of `set_permissions`.
    pub(crate) async fn may(&self, [configure, write, read]: [&str; 3]) {
        rabbitmqctl(&["set_permissions", &self.name, configure, write, read]).await;
    }

    pub(crate) fn url(&self) -> String {
        amqp_url().replace("guest:guest@", &format!("{}:{}@", self.name, self.password))
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let mut command = Command::new(server("COMPOSITE_START_TEST_RABBITMQCTL"));
        let _ = command.args(["-q", "delete_user", &self.name]).status();
    }
}
