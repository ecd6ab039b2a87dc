//! A certificate authority made when a test runs, and the certificates it signs.

use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose, date_time_ymd,
};
use tempfile::TempDir;

/// An authority; its files are removed when it is dropped.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    pub(crate) folder: TempDir,
}

/// A certificate and its key, in files.
pub(crate) struct Signed {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut parameters = named("tests");
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let issuer = CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("ca.pem"), issuer.pem()).unwrap();
        Self { issuer, folder }
    }

    /// The authority's own certificate.
    pub(crate) fn file(&self) -> String {
        text(&self.folder.path().join("ca.pem"))
    }

    /// A certificate for a host or a user of this name.
    pub(crate) fn signs(&self, name: &str) -> Signed {
        self.sign(name, name, named(name))
    }

    /// One that has expired.
    pub(crate) fn signed_long_ago(&self, name: &str) -> Signed {
        let mut parameters = named(name);
        (parameters.not_before, parameters.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1));
        self.sign("expired", name, parameters)
    }

    fn sign(&self, file: &str, name: &str, mut parameters: CertificateParams) -> Signed {
        parameters.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap();
        let write = |ending: &str, pem: String| {
            let path: PathBuf = self.folder.path().join(format!("{file}{ending}"));
            std::fs::write(&path, pem).unwrap();
            text(&path)
        };
        Signed { certificate: write(".pem", certificate.pem()), key: write(".key", key.serialize_pem()) }
    }
}

fn named(name: &str) -> CertificateParams {
    CertificateParams::new(vec![name.to_owned()]).unwrap()
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}
