//! Judges messages of the key broker protocol with the types that Trustee uses, and plays both of its sides.
//!
//! The word on the command line says what; the message comes on standard input, the answer goes to standard output.
//!
//!     request | challenge | attestation | error    parse it strictly, and write it as the crate does
//!     report-data   an attestation                 the SHA-384 that evidence is bound to, in hex
//!     keygen        {"crv"}                        a client's key pair: {"crv", "private", "tee-pubkey"}
//!     seal          {"tee-pubkey", "content"}      a server's response to that key
//!     open          {"crv", "private", "response"} what a client of the guest components makes of a response

use std::io::{Read, Write};

use aes_gcm::aead::{Aead, KeyInit, OsRng, Payload};
use aes_gcm::{AeadCore, Aes256Gcm};
use aes_kw::KekAes256;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use base64::Engine;
use kbs_types::{Attestation, Challenge, ErrorInformation, ProtectedHeader, Request, Response, TeePubKey};
use p256::elliptic_curve::ecdh::diffie_hellman;
use p256::elliptic_curve::sec1::{EncodedPoint, FromEncodedPoint, ModulusSize, ToEncodedPoint};
use p256::elliptic_curve::{AffinePoint, CurveArithmetic, FieldBytes, FieldBytesSize, PublicKey, SecretKey};
use p256::NistP256;
use p521::NistP521;
use serde_json::{json, Value};
use sha2::{Digest, Sha256, Sha384};

const ALGORITHM: &str = "ECDH-ES+A256KW";

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome<()> {
    let word = std::env::args().nth(1).ok_or("which message?")?;
    let mut input = Vec::new();
    std::io::stdin().read_to_end(&mut input)?;
    let output = match word.as_str() {
        "request" => serde_json::to_vec(&serde_json::from_slice::<Request>(&input)?)?,
        "challenge" => serde_json::to_vec(&serde_json::from_slice::<Challenge>(&input)?)?,
        "attestation" => serde_json::to_vec(&serde_json::from_slice::<Attestation>(&input)?)?,
        "error" => serde_json::to_vec(&serde_json::from_slice::<ErrorInformation>(&input)?)?,
        "report-data" => report_data(serde_json::from_slice(&input)?)?.into_bytes(),
        "keygen" => {
            let pair = by_curve(serde_json::from_slice(&input)?, keygen::<NistP256>, keygen::<NistP521>)?;
            serde_json::to_vec(&pair)?
        }
        "seal" => serde_json::to_vec(&seal(serde_json::from_slice(&input)?)?)?,
        "open" => by_curve(serde_json::from_slice(&input)?, open::<NistP256>, open::<NistP521>)?,
        _ => return Err("no such message".into()),
    };
    std::io::stdout().write_all(&output)?;
    Ok(())
}

/// Members in the order of their names and without spaces, as serde_json writes its maps: RFC 8785 for these texts.
fn report_data(attestation: Attestation) -> Outcome<String> {
    let bound = json!({
        "additional-evidence": attestation.tee_evidence.additional_evidence,
        "nonce": attestation.runtime_data.nonce,
        "tee-pubkey": attestation.runtime_data.tee_pubkey,
    });
    Ok(Sha384::digest(serde_json::to_vec(&bound)?).iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The curves of session keys: those that the guest components have.
trait SessionCurve: CurveArithmetic {
    const NAME: &'static str;
}

impl SessionCurve for NistP256 {
    const NAME: &'static str = "P-256";
}

impl SessionCurve for NistP521 {
    const NAME: &'static str = "P-521";
}

fn by_curve<T>(input: Value, p256: fn(Value) -> Outcome<T>, p521: fn(Value) -> Outcome<T>) -> Outcome<T> {
    match input["crv"].as_str() {
        Some(NistP256::NAME) => p256(input),
        Some(NistP521::NAME) => p521(input),
        _ => Err("another curve".into()),
    }
}

fn keygen<C: SessionCurve>(_input: Value) -> Outcome<Value>
where
    FieldBytesSize<C>: ModulusSize,
    AffinePoint<C>: FromEncodedPoint<C> + ToEncodedPoint<C>,
{
    let secret = SecretKey::<C>::random(&mut OsRng);
    let (x, y) = coordinates(&secret.public_key());
    let public = TeePubKey::EC { crv: C::NAME.into(), alg: ALGORITHM.into(), x, y };
    Ok(json!({"crv": C::NAME, "private": STANDARD.encode(secret.to_bytes()), "tee-pubkey": public}))
}

fn coordinates<C: SessionCurve>(key: &PublicKey<C>) -> (String, String)
where
    FieldBytesSize<C>: ModulusSize,
    AffinePoint<C>: FromEncodedPoint<C> + ToEncodedPoint<C>,
{
    let point = key.to_encoded_point(false);
    let encode = |part: Option<&FieldBytes<C>>| URL_SAFE_NO_PAD.encode(part.expect("not the point at infinity"));
    (encode(point.x()), encode(point.y()))
}

fn public_key<C: SessionCurve>(x: &str, y: &str) -> Outcome<PublicKey<C>>
where
    FieldBytesSize<C>: ModulusSize,
    AffinePoint<C>: FromEncodedPoint<C> + ToEncodedPoint<C>,
{
    let (x, y) = (URL_SAFE_NO_PAD.decode(x)?, URL_SAFE_NO_PAD.decode(y)?);
    let size = FieldBytes::<C>::default().len();
    if x.len() != size || y.len() != size {
        return Err("a coordinate is not as long as the curve's".into());
    }
    let point = EncodedPoint::<C>::from_affine_coordinates(x.as_slice().into(), y.as_slice().into(), false);
    Option::from(PublicKey::<C>::from_encoded_point(&point)).ok_or("the point is not on the curve".into())
}

/// Concat KDF of RFC 7518, 4.6.2, with neither party's information.
fn key_encryption_key(shared: &[u8]) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(1u32.to_be_bytes());
    hash.update(shared);
    hash.update((ALGORITHM.len() as u32).to_be_bytes());
    hash.update(ALGORITHM);
    hash.update(0u32.to_be_bytes());
    hash.update(0u32.to_be_bytes());
    hash.update(256u32.to_be_bytes());
    hash.finalize().into()
}

fn seal(input: Value) -> Outcome<Response> {
    let TeePubKey::EC { crv, alg, x, y } = serde_json::from_value(input["tee-pubkey"].clone())? else {
        return Err("only EC keys".into());
    };
    if alg != ALGORITHM {
        return Err("another algorithm".into());
    }
    let content = STANDARD.decode(input["content"].as_str().ok_or("no content")?)?;
    match crv.as_str() {
        NistP256::NAME => seal_to::<NistP256>(&x, &y, &content),
        NistP521::NAME => seal_to::<NistP521>(&x, &y, &content),
        _ => Err("another curve".into()),
    }
}

fn seal_to<C: SessionCurve>(x: &str, y: &str, content: &[u8]) -> Outcome<Response>
where
    FieldBytesSize<C>: ModulusSize,
    AffinePoint<C>: FromEncodedPoint<C> + ToEncodedPoint<C>,
{
    let ephemeral = SecretKey::<C>::random(&mut OsRng);
    let shared = diffie_hellman(ephemeral.to_nonzero_scalar(), public_key::<C>(x, y)?.as_affine());
    let kek = KekAes256::from(key_encryption_key(shared.raw_secret_bytes()));
    let cek = Aes256Gcm::generate_key(&mut OsRng);
    let (x, y) = coordinates(&ephemeral.public_key());
    let others = json!({"epk": {"crv": C::NAME, "kty": "EC", "x": x, "y": y}});
    let protected = ProtectedHeader {
        alg: ALGORITHM.into(),
        enc: "A256GCM".into(),
        other_fields: others.as_object().expect("an object").clone(),
    };
    let iv = Aes256Gcm::generate_nonce(&mut OsRng);
    let aad = protected.generate_aad().map_err(|error| format!("{error:?}"))?;
    let mut sealed = Aes256Gcm::new(&cek)
        .encrypt(&iv, Payload { msg: content, aad: &aad })
        .map_err(|_| "the content does not encrypt")?;
    let tag = sealed.split_off(sealed.len() - 16);
    Ok(Response {
        protected,
        encrypted_key: kek.wrap_vec(&cek).map_err(|error| format!("{error}"))?,
        aad: None,
        iv: iv.to_vec(),
        ciphertext: sealed,
        tag,
    })
}

/// The associated data is written anew from the parsed header, as the guest components do it.
fn open<C: SessionCurve>(input: Value) -> Outcome<Vec<u8>>
where
    FieldBytesSize<C>: ModulusSize,
    AffinePoint<C>: FromEncodedPoint<C> + ToEncodedPoint<C>,
{
    let secret = SecretKey::<C>::from_slice(&STANDARD.decode(input["private"].as_str().ok_or("no private")?)?)?;
    let response: Response = serde_json::from_value(input["response"].clone())?;
    if response.protected.alg != ALGORITHM || response.protected.enc != "A256GCM" {
        return Err("another algorithm".into());
    }
    let epk = response.protected.other_fields.get("epk").ok_or("no epk")?;
    let member = |name: &str| epk.get(name).and_then(Value::as_str).ok_or(format!("no {name}"));
    if member("crv")? != C::NAME {
        return Err("another curve".into());
    }
    let shared = diffie_hellman(secret.to_nonzero_scalar(), public_key::<C>(member("x")?, member("y")?)?.as_affine());
    let kek = KekAes256::from(key_encryption_key(shared.raw_secret_bytes()));
    let cek = kek.unwrap_vec(&response.encrypted_key).map_err(|error| format!("{error}"))?;
    let aad = response.protected.generate_aad().map_err(|error| format!("{error:?}"))?;
    let iv: [u8; 12] = response.iv.try_into().map_err(|_| "the iv is not 12 bytes")?;
    let sealed = [response.ciphertext, response.tag].concat();
    Aes256Gcm::new_from_slice(&cek)?
        .decrypt(&iv.into(), Payload { msg: &sealed, aad: &aad })
        .map_err(|_| "the response does not open".into())
}
