//! What is read from files to reach a server: whom to trust, what to show, and the password.
//!
//! They are read and checked with the settings, so that a wrong one is a wrong setting, and again for each connection,
//! so that a renewed certificate or password is taken without a restart.

use std::error::Error;
use std::fmt::Display;
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use rustls::{AlertDescription, CertificateError, InconsistentKeys, RootCertStore};

use crate::settings::{SecretUrl, SettingsError};
use crate::terminal::is_printable;

/// The files that one section of the settings names; an empty path is none.
#[derive(Clone, Copy)]
pub(crate) struct Files<'a> {
    /// Begins the keys.
    pub(crate) section: &'static str,
    pub(crate) ca_file: &'a Path,
    pub(crate) cert_file: &'a Path,
    pub(crate) key_file: &'a Path,
    pub(crate) password_file: &'a Path,
}

/// What the files hold.
pub(crate) struct Credentials {
    /// To trust instead of the system's.
    pub(crate) authorities: Option<Certificates>,
    pub(crate) identity: Option<Identity>,
    pub(crate) password: Option<String>,
}

/// Certificates, and the text they were read from, without which the Redis client takes none.
pub(crate) struct Certificates {
    pub(crate) pem: Vec<u8>,
    pub(crate) parsed: Vec<CertificateDer<'static>>,
}

/// The certificate that a server may ask for, with those that lead to its authority, and its key.
pub(crate) struct Identity {
    pub(crate) chain: Certificates,
    pub(crate) key_pem: Vec<u8>,
    pub(crate) key: PrivateKeyDer<'static>,
}

impl Files<'_> {
    /// Whether a file is given that only TLS has a use for; its key.
    pub(crate) fn needs_tls(&self) -> Option<String> {
        let files = [("ca_file", self.ca_file), ("cert_file", self.cert_file), ("key_file", self.key_file)];
        files.into_iter().find(|(_, path)| is_given(path)).map(|(name, _)| self.key(name))
    }

    pub(crate) fn have_password(&self) -> bool {
        is_given(self.password_file)
    }

    pub(crate) fn have_identity(&self) -> bool {
        is_given(self.cert_file)
    }

    /// The files as they are now.
    ///
    /// # Errors
    /// Which of them is wrong, and how.
    pub(crate) fn read(&self) -> Result<Credentials, SettingsError> {
        Ok(Credentials {
            authorities: is_given(self.ca_file).then(|| self.authorities()).transpose()?,
            identity: self.identity()?,
            password: self.have_password().then(|| self.password()).transpose()?,
        })
    }

    fn authorities(&self) -> Result<Certificates, SettingsError> {
        const NAME: &str = "ca_file";
        let authorities = self.certificates(NAME, self.ca_file)?;
        for certificate in &authorities.parsed {
            // Whatever it objects to, a client would have left this authority out in silence.
            RootCertStore::empty().add(certificate.clone()).map_err(|error| {
                self.wrong(NAME, self.ca_file, format_args!("holds a certificate that cannot be read: {error}"))
            })?;
        }
        Ok(authorities)
    }

    fn identity(&self) -> Result<Option<Identity>, SettingsError> {
        match (is_given(self.cert_file), is_given(self.key_file)) {
            (false, false) => return Ok(None),
            (true, true) => {}
            (true, false) => return Err(SettingsError::new(&self.key("key_file"), "must stand beside cert_file")),
            (false, true) => return Err(SettingsError::new(&self.key("cert_file"), "must stand beside key_file")),
        }
        let chain = self.certificates("cert_file", self.cert_file)?;
        let key_pem = self.bytes("key_file", self.key_file)?;
        let wrong_key = |rule: &dyn Display| self.wrong("key_file", self.key_file, rule);
        // Not the error of the parser, which may quote the file.
        let key = PrivateKeyDer::from_pem_slice(&key_pem)
            .map_err(|_| wrong_key(&"holds no private key without a passphrase in PEM"))?;
        CertifiedKey::from_der(chain.parsed.clone(), key.clone_key(), &ring::default_provider()).map_err(|error| {
            match error {
                rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                    wrong_key(&format_args!("is not the key of the certificate in {}", self.key("cert_file")))
                }
                error => wrong_key(&error),
            }
        })?;
        Ok(Some(Identity { chain, key_pem, key }))
    }

    fn certificates(&self, name: &str, path: &Path) -> Result<Certificates, SettingsError> {
        let pem = self.bytes(name, path)?;
        match CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>() {
            Ok(parsed) if !parsed.is_empty() => Ok(Certificates { pem, parsed }),
            Ok(_) => Err(self.wrong(name, path, "holds no certificate in PEM")),
            // Not the error of the parser, which lists bytes.
            Err(_) => Err(self.wrong(name, path, "is not PEM, or is cut short")),
        }
    }

    fn password(&self) -> Result<String, SettingsError> {
        const NAME: &str = "password_file";
        let wrong = |rule| self.wrong(NAME, self.password_file, rule);
        let text = String::from_utf8(self.bytes(NAME, self.password_file)?).map_err(|_| wrong("is not UTF-8"))?;
        // An editor ends the last line, and `echo` does.
        let line = text.strip_suffix('\n').unwrap_or(&text);
        let password = line.strip_suffix('\r').unwrap_or(line);
        if password.is_empty() {
            return Err(wrong("is empty"));
        }
        Ok(password.to_owned())
    }

    fn bytes(&self, name: &str, path: &Path) -> Result<Vec<u8>, SettingsError> {
        std::fs::read(path).map_err(|error| self.wrong(name, path, error))
    }

    /// Names a file only if its name is a whole path, and never that with the password: somebody may have put there what
    /// should stand in the file.
    fn wrong(&self, name: &str, path: &Path, rule: impl Display) -> SettingsError {
        let is_path = |path: &str| path.starts_with('/') && path.chars().all(is_printable);
        let file = path.to_str().filter(|path| name != "password_file" && is_path(path));
        SettingsError::new(&self.key(name), format_args!("{}: {rule}", file.unwrap_or("the file")))
    }

    pub(crate) fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.section)
    }
}

fn is_given(path: &Path) -> bool {
    !path.as_os_str().is_empty()
}

/// Added to the cause where a connection was cut off before it was of any use. A server that does not take our certificate
/// says so when the handshake is over for us; if we have written since, its end may come before its word.
pub(crate) fn hint_when_cut_off(url: &SecretUrl) -> &'static str {
    if url.is_tls() {
        ", as by a server that wants a client certificate, or another one"
    } else {
        ", as by a port for TLS"
    }
}

/// Added to the cause where nothing was said on a new connection.
pub(crate) fn hint_when_silent(url: &SecretUrl) -> &'static str {
    if url.is_tls() { ", as a port without TLS may do" } else { "" }
}

/// What a failure of TLS means and what to do about it, if `error` is one; `section` begins the keys of the settings.
pub(crate) fn tls_failure(error: &(dyn Error + 'static), section: &str) -> Option<String> {
    use AlertDescription::{
        BadCertificate, CertificateExpired, CertificateRequired, CertificateUnknown, DecryptError, HandshakeFailure,
        UnknownCA,
    };
    let error = below(error)?;
    Some(match error {
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            format!(
                "TLS: no trusted authority has signed the server's certificate: {section}.ca_file names those to trust"
            )
        }
        rustls::Error::InvalidMessage(_) => "TLS: the other side does not speak it: is this its plain port?".to_owned(),
        rustls::Error::AlertReceived(CertificateRequired | HandshakeFailure) => {
            format!(
                "TLS: the server wants a client certificate ({error}): set {section}.cert_file and {section}.key_file"
            )
        }
        rustls::Error::AlertReceived(
            UnknownCA | BadCertificate | CertificateExpired | CertificateUnknown | DecryptError,
        ) => {
            format!("TLS: the server does not take our client certificate, {section}.cert_file ({error})")
        }
        error => format!("TLS: {error}"),
    })
}

/// The first error of a kind among `error` and what caused it. A wrapper of either client hides what it holds from `source`.
pub(crate) fn below<'a, E: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a E> {
    if let Some(found) = error.downcast_ref() {
        return Some(found);
    }
    let next: &'a (dyn Error + 'static) = if let Some(error) = error.downcast_ref::<io::Error>() {
        error.get_ref()?
    } else if let Some(error) = error.downcast_ref::<Arc<dyn Error + Send + Sync>>() {
        &**error
    } else {
        error.source()?
    };
    below(next)
}
