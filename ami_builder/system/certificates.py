"""A small CA for one Dask cluster, and the certificates that it issues: ECDSA P-256, signed with SHA-256.

Dask does not compare host names (`check_hostname = False` in distributed/security.py). So a certificate
shows that this CA issued it, and whether its holder may accept connections: a client may not.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from ami_builder.core.errors import UsageError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes

_BACKDATED = datetime.timedelta(hours=1)
"""The clock of a machine that boots may be slow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """A certificate with its key, and the CA's certificate; all are PEM."""

    ca: str
    certificate: str
    key: str
    end: datetime.datetime

    @property
    def bundle(self) -> str:
        """All in one text, in the order that start-dask expects in Secrets Manager and SSM."""
        return self.ca + self.certificate + self.key


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """A CA: its certificate and its key."""

    _certificate: x509.Certificate
    _key: CertificateIssuerPrivateKeyTypes

    @classmethod
    def create(cls, *, days: int) -> Self:
        """Make a new CA that is valid for so many days from now."""
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        subject, now = _name("Dask CA"), _now()
        usage = _usage(key_cert_sign=True, crl_sign=True)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATED)
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(_certificate=certificate, _key=key)

    @classmethod
    def load(cls, certificate: bytes, key: bytes) -> Self:
        """Read a CA from PEM. Raises UsageError if it is not one, or if it has ended."""
        from cryptography import x509
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
        from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            found = x509.load_pem_x509_certificate(certificate)
            private = load_pem_private_key(key, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as wrong:
            raise UsageError(f"it can't be read: {wrong}") from wrong
        if not isinstance(private, (EllipticCurvePrivateKey, RSAPrivateKey)):
            raise UsageError("its key is neither EC nor RSA")
        if private.public_key() != found.public_key():
            raise UsageError("its key does not belong to its certificate")
        try:
            is_ca = found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        except x509.ExtensionNotFound:
            is_ca = False
        if not is_ca:
            raise UsageError("its certificate is not a CA's")
        try:
            found.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        except x509.ExtensionNotFound:
            # Python 3.13 refuses it by default.
            raise UsageError("its certificate has no subject key identifier") from None
        if found.not_valid_after_utc <= _now():
            raise UsageError(f"it ended on {found.not_valid_after_utc:%Y-%m-%d}")
        return cls(_certificate=found, _key=private)

    @property
    def pem(self) -> str:
        """The certificate."""
        return _pem(self._certificate)

    @property
    def key_pem(self) -> str:
        """The key, which must not leave the CA's folder."""
        return _key_pem(self._key)

    @property
    def end(self) -> datetime.datetime:
        """When the CA, and with it every certificate, ends."""
        return self._certificate.not_valid_after_utc

    def issue(self, name: str, *, days: int, serves: bool) -> Certificate:
        """Make a key and its certificate, valid for so many days but not longer than the CA.

        With `serves`, its holder may accept connections, as schedulers and workers do.
        """
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID

        key = ec.generate_private_key(ec.SECP256R1())
        now = _now()
        end = min(now + datetime.timedelta(days=days), self.end)
        identifier = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if serves:
            uses.append(ExtendedKeyUsageOID.SERVER_AUTH)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(self._certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(max(now - _BACKDATED, self._certificate.not_valid_before_utc))
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )
        return Certificate(ca=self.pem, certificate=_pem(certificate), key=_key_pem(key), end=end)

    def issued(self, certificate: bytes) -> bool:
        """Return whether this CA issued a certificate (PEM)."""
        from cryptography import x509
        from cryptography.exceptions import InvalidSignature

        try:
            x509.load_pem_x509_certificate(certificate).verify_directly_issued_by(self._certificate)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def _name(common: str) -> x509.Name:
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common)])


def _usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM).decode()


def _key_pem(key: CertificateIssuerPrivateKeyTypes) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
