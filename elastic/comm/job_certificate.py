"""The certificate of a job, made from its secret: the same on every host, and the only one that its hosts accept."""

from __future__ import annotations

import datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from elastic.comm.tls import Credentials

_PURPOSE = b"elastic: the key of a job's certificate"
_BEGIN, _END = datetime.datetime(2000, 1, 1), datetime.datetime(9999, 12, 31, 23, 59, 59)  # it ends with the job; clocks do not matter


def job_credentials(secret: bytes) -> Credentials:
    """Returns the job's certificate, signed by itself, and its key, an Ed25519 key derived from the secret with HKDF-SHA256 (RFC 5869).

    No field depends on anything but the secret, nor does an Ed25519 signature.
    """
    key = Ed25519PrivateKey.from_private_bytes(HKDF(algorithm=SHA256(), length=32, salt=None, info=_PURPOSE).derive(secret))
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a job of elastic")])
    made = x509.CertificateBuilder(issuer_name=name, subject_name=name, public_key=key.public_key(), serial_number=1)
    certificate = made.not_valid_before(_BEGIN).not_valid_after(_END).sign(key, None).public_bytes(Encoding.PEM).decode()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    return Credentials(certificate=certificate, key=private, authority=certificate)
