use super::*;
use futures_util::task::noop_waker_ref;
use lapin::BasicProperties;
use lapin::protocol::basic::parse_properties;
use lapin::types::{AMQPValue, FieldTable};
use proptest::prelude::*;

const BODY: u8 = 3;
const HEARTBEAT: u8 = 8;
const CHANNEL: [u8; 2] = [1, 44];
const BODY_BYTES: [u8; 8] = 1_234_567_u64.to_be_bytes();

fn length(bytes: &[u8]) -> [u8; 4] {
    u32::try_from(bytes.len()).unwrap().to_be_bytes()
}

fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    [&[kind], &CHANNEL[..], &length(payload), payload, &[FrameHead::END]].concat()
}

fn short(text: &[u8]) -> Vec<u8> {
    [&[u8::try_from(text.len()).unwrap()], text].concat()
}

/// A table or an array: its bytes behind their length.
fn sized(bytes: &[u8]) -> Vec<u8> {
    [&length(bytes), bytes].concat()
}

/// A header of one entry; `value` begins with its type.
fn headers(key: &[u8], value: &[u8]) -> Vec<u8> {
    sized(&[&short(key), value].concat())
}

fn nested(levels: usize, kind: u8) -> Vec<u8> {
    let mut value = vec![b'V'];
    for _ in 0..levels {
        let inner = if kind == b'F' { [short(b"k"), value].concat() } else { value };
        value = [&[kind], &sized(&inner)[..]].concat();
    }
    value
}

fn flag(name: &str) -> u16 {
    let bit = PROPERTIES.iter().position(|(other, _)| *other == name).unwrap();
    1 << (15 - bit)
}

fn content_header(flags: u16, properties: &[u8]) -> Vec<u8> {
    let payload = [&[0, 60, 0, 0], &BODY_BYTES[..], &flags.to_be_bytes(), properties].concat();
    frame(FrameHead::CONTENT_HEADER, &payload)
}

fn deliver(exchange: &[u8], routing_key: &[u8]) -> Vec<u8> {
    deliver_tagged(7, exchange, routing_key)
}

fn deliver_tagged(tag: u64, exchange: &[u8], routing_key: &[u8]) -> Vec<u8> {
    let texts = [&short(b"ctag")[..], &tag.to_be_bytes(), &[1], &short(exchange), &short(routing_key)].concat();
    frame(FrameHead::METHOD, &[&[0, 60, 0, 60], &texts[..]].concat())
}

/// A socket that gives its bytes in pieces of these sizes, over and over; 0 is "nothing yet".
struct Pieces<'a> {
    bytes: &'a [u8],
    sizes: std::iter::Cycle<std::slice::Iter<'a, usize>>,
}

impl AsyncRead for Pieces<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, out: &mut [u8]) -> Poll<io::Result<usize>> {
        let size = *self.sizes.next().unwrap();
        if size == 0 {
            return Poll::Pending;
        }
        assert!(!out.is_empty(), "an empty read looks like the end");
        let count = size.min(out.len()).min(self.bytes.len());
        out[..count].copy_from_slice(&self.bytes[..count]);
        self.bytes = &self.bytes[count..];
        Poll::Ready(Ok(count))
    }
}

/// What lapin would read, `out_bytes` at a time, of a socket that gives `bytes` in pieces of `sizes`.
fn read_through(bytes: &[u8], sizes: &[usize], out_bytes: usize) -> Vec<u8> {
    let mut guarded = Guarded::new(
        Pieces { bytes, sizes: sizes.iter().cycle() },
        Lifeline::default(),
        Cork::default(),
        Allowance::unlimited(),
        Overheard::default(),
    );
    let (mut read, mut out) = (Vec::new(), vec![0; out_bytes]);
    loop {
        match Pin::new(&mut guarded).poll_read(&mut Context::from_waker(noop_waker_ref()), &mut out) {
            Poll::Ready(Ok(0)) => return read,
            Poll::Ready(Ok(count)) => read.extend_from_slice(&out[..count]),
            Poll::Ready(Err(error)) => panic!("{error}"),
            Poll::Pending => {}
        }
    }
}

fn read_at_once(bytes: &[u8]) -> Vec<u8> {
    read_through(bytes, &[usize::MAX], READ_BYTES)
}

/// The properties of a content header frame as lapin itself reads them; an error where it could not.
fn lapin_reads(frame: &[u8]) -> Result<BasicProperties, String> {
    let head = FrameHead::read(frame).ok_or("no frame")?;
    assert_eq!((head.kind, head.channel, head.whole), (FrameHead::CONTENT_HEADER, CHANNEL, frame.len()));
    assert_eq!(frame.last(), Some(&FrameHead::END));
    let (rest, properties) =
        parse_properties(&frame[FrameHead::BYTES + 12..frame.len() - 1]).map_err(|error| error.to_string())?;
    if rest.is_empty() { Ok(properties) } else { Err("more than properties".into()) }
}

/// Why a content header was replaced, read from its replacement; the size of the body must have survived.
fn reason(replacement: &[u8]) -> String {
    assert_eq!(replacement[FrameHead::BYTES + 4..FrameHead::BYTES + 12], BODY_BYTES);
    let properties = lapin_reads(replacement).unwrap();
    let headers = properties.headers().as_ref().map(FieldTable::inner).unwrap();
    let [(name, AMQPValue::LongString(reason))] = &headers.iter().collect::<Vec<_>>()[..] else {
        panic!("{properties:?}")
    };
    assert_eq!(name.as_str(), UNREADABLE);
    reason.to_string()
}

/// Every property and every type of value, at the longest that is taken.
fn everything() -> Vec<u8> {
    let mut entries = Vec::new();
    for (kind, bytes) in
        [(b'V', 0), (b't', 1), (b'b', 1), (b'B', 1), (b's', 2), (b'U', 2), (b'u', 2), (b'I', 4), (b'i', 4), (b'f', 4)]
    {
        entries.extend([&short(&[b'k', kind]), &vec![kind][..], &vec![0xff; bytes]].concat());
    }
    for (kind, bytes) in [(b'D', 5), (b'L', 8), (b'l', 8), (b'd', 8), (b'T', 8)] {
        entries.extend([&short(&[b'k', kind]), &vec![kind][..], &vec![0xfe; bytes]].concat());
    }
    for kind in *b"Sx" {
        entries.extend([&short(&[kind]), &[kind][..], &sized(b"\xff\xfe not text")].concat());
    }
    for kind in *b"FA" {
        entries.extend([short(&[kind]), nested(DEEPEST_HEADERS - 1, kind)].concat());
    }
    let text = short(&[b'x'; 255]);
    let (texts, empty) = (text.repeat(2), short(b""));
    [&texts, &sized(&entries), &[2, 9][..], &texts, &empty, &text, &[0xff; 8], &text.repeat(4)].concat()
}

const ALL_FLAGS: u16 = 0b1111_1111_1111_1100;

#[test]
fn good_frames_pass_as_they_came() {
    let long_text = headers(b"k", &[b"S", &sized(&vec![7; 60_000])[..]].concat());
    let frames = [
        content_header(ALL_FLAGS, &everything()),
        content_header(0, &[]),
        content_header(flag("headers"), &long_text),
        content_header(flag("correlation_id"), &short("é😀".as_bytes())),
        deliver(b"", b"requests"),
        deliver_tagged(u64::MAX, b"", b"requests"),
        deliver("é".as_bytes(), &[b'x'; 255]),
        frame(FrameHead::METHOD, &[0, 10, 0, 10, 0xff, 0xfe]),
        frame(FrameHead::METHOD, &[]),
        frame(BODY, &vec![0xff; 300_000]),
        frame(BODY, &[]),
        frame(HEARTBEAT, &[]),
    ];
    lapin_reads(&frames[0]).unwrap();
    for frame in &frames {
        assert_eq!(&read_at_once(frame), frame);
    }
    assert_eq!(read_at_once(&frames.concat()), frames.concat());
}

#[test]
fn a_content_header_that_lapin_could_not_read_is_replaced_by_the_reason() {
    const NOT_UTF8: &[u8] = b"\xe9";
    let mut cases = vec![
        ("headers has a value of unknown type", flag("headers"), headers(b"k", b"Zx")),
        ("headers has a key that is not UTF-8", flag("headers"), headers(NOT_UTF8, b"V")),
        ("headers nests too deep", flag("headers"), headers(b"k", &nested(DEEPEST_HEADERS, b'F'))),
        ("headers nests too deep", flag("headers"), headers(b"k", &nested(DEEPEST_HEADERS, b'A'))),
        ("headers is cut short", flag("headers"), vec![0, 0, 0]),
        ("headers is cut short", flag("headers"), vec![0xff; 4]),
        ("headers is cut short", flag("headers"), headers(b"k", b"t")),
        ("headers is cut short", flag("headers"), headers(b"k", b"S\0\0\0\x09x")),
        ("headers is cut short", flag("headers"), headers(b"k", b"A\0\0\0\x01F")),
        ("headers is cut short", flag("headers"), sized(b"\x05k")),
        ("headers is cut short", flag("headers"), headers(b"k", b"")),
        ("priority is cut short", flag("delivery_mode") | flag("priority"), vec![1]),
        ("timestamp is cut short", flag("timestamp"), vec![0; 7]),
        ("of unknown kind", 1, vec![]),
        ("of unknown kind", 2, vec![]),
        ("of unknown kind", 0, vec![0]),
        ("of unknown kind", flag("priority"), vec![1, 1]),
    ];
    let texts = PROPERTIES.iter().filter(|(_, kind)| matches!(kind, Kind::ShortString)).map(|(name, _)| *name);
    for (name, what, bytes) in texts.flat_map(|name| {
        [(name, "is not UTF-8", short(NOT_UTF8)), (name, "is cut short", vec![9, b'x']), (name, "is cut short", vec![])]
    }) {
        cases.push((format!("{name} {what}").leak(), flag(name), bytes));
    }
    for (expected, flags, properties) in cases {
        let odd = content_header(flags, &properties);
        if flags & !ALL_FLAGS == 0 && !expected.ends_with("deep") {
            assert!(lapin_reads(&odd).is_err(), "lapin reads {expected:?}");
        }
        assert_eq!(reason(&read_at_once(&odd)), expected);
    }
}

#[test]
fn headers_of_64_kib_pass_and_larger_ones_are_replaced() {
    const AROUND: usize = 14 + 4 + 2 + 1 + 4;
    let of = |bytes: usize| headers(b"k", &[b"S", &sized(&vec![0; bytes])[..]].concat());
    let largest = content_header(flag("headers"), &of(LARGEST_PROPERTIES - AROUND));
    assert_eq!(read_at_once(&largest), largest);
    let larger = content_header(flag("headers"), &of(LARGEST_PROPERTIES - AROUND + 1));
    assert_eq!(reason(&read_at_once(&larger)), "65537 bytes, at most 65536 are taken");
    let huge = content_header(flag("headers"), &of(4 * READ_BYTES));
    assert_eq!(
        reason(&read_through(&huge, &[1000], 1000)),
        format!("{} bytes, at most 65536 are taken", 4 * READ_BYTES + AROUND)
    );
}

#[test]
fn a_content_header_nested_thousands_deep_overflows_no_stack() {
    for (kind, most_that_fit) in [(b'F', 9_000), (b'A', 13_000)] {
        let deep = content_header(flag("headers"), &headers(b"k", &nested(most_that_fit, kind)));
        assert_eq!(reason(&read_at_once(&deep)), "headers nests too deep");
    }
}

#[test]
fn a_content_header_too_short_for_flags_is_replaced_too() {
    for bytes in 0..14 {
        let payload = &[&[0, 60, 0, 0], &BODY_BYTES[..], &[0, 0]].concat()[..bytes];
        let replaced = read_at_once(&frame(FrameHead::CONTENT_HEADER, payload));
        let properties = lapin_reads(&replaced).unwrap();
        let reason = properties.headers().as_ref().unwrap().inner().get(UNREADABLE);
        assert_eq!(reason, Some(&AMQPValue::LongString("cut short".into())), "{bytes} bytes");
        let announced = if bytes >= 12 { BODY_BYTES } else { [0; 8] };
        assert_eq!(replaced[FrameHead::BYTES + 4..FrameHead::BYTES + 12], announced);
    }
}

#[test]
fn odd_bytes_in_the_exchange_or_routing_key_of_a_delivery_become_question_marks() {
    // A length of 0xC3 and the 0xA9 behind it are an "é" to who looks at the whole.
    let (two_faced, mended) = ([&[0xa9], &[b'x'; 0xc2][..]].concat(), [b"?", &[b'x'; 0xc2][..]].concat());
    let cases: [[&[u8]; 4]; 5] = [
        [b"", b"caf\xe9", b"", b"caf?"],
        [b"\xff\xfea", b"\xc3\xa9", b"??a", b"\xc3\xa9"],
        [b"\xc3", b"\xa9", b"?", b"?"],
        [b"\xc3\xa9\xff", b"a", b"???", b"a"],
        [b"", &two_faced, b"", &mended],
    ];
    for [exchange, routing_key, mended_exchange, mended_key] in cases {
        for tag in [7, u64::MAX] {
            let read = read_at_once(&deliver_tagged(tag, exchange, routing_key));
            assert_eq!(read, deliver_tagged(tag, mended_exchange, mended_key));
        }
    }
}

#[test]
fn odd_bytes_in_the_exchange_or_routing_key_of_a_message_that_was_asked_for_become_question_marks() {
    let get_ok = |exchange: &[u8], routing_key: &[u8]| {
        let texts = [&7_u64.to_be_bytes()[..], &[1], &short(exchange), &short(routing_key), &[255; 4]].concat();
        frame(FrameHead::METHOD, &[&[0, 60, 0, 71], &texts[..]].concat())
    };
    assert_eq!(read_at_once(&get_ok(b"dlx\xff", b"\xfe")), get_ok(b"dlx?", b"?"));
    assert_eq!(read_at_once(&get_ok(b"dlx", "é".as_bytes())), get_ok(b"dlx", "é".as_bytes()));
}

#[test]
fn a_delivery_that_is_cut_short_passes_as_it_came() {
    let whole = deliver(b"\xff", b"\xff");
    let payload = &whole[FrameHead::BYTES..whole.len() - 1];
    for bytes in 0..payload.len() - 4 {
        let cut = frame(FrameHead::METHOD, &payload[..bytes]);
        assert_eq!(read_at_once(&cut), cut, "{bytes} bytes");
    }
}

#[test]
fn what_follows_a_replaced_header_is_read_in_large_pieces_again() {
    let mut buffer = Buffer::new(Allowance::unlimited(), Overheard::default());
    let odd = content_header(flag("headers"), &headers(b"k", &[b"S", &sized(&vec![0; 100_000])[..]].concat()));
    for _ in 0..10 {
        let mut rest = &odd[..];
        while !rest.is_empty() {
            let room = buffer.room();
            let count = room.len().min(rest.len());
            room[..count].copy_from_slice(&rest[..count]);
            rest = &rest[count..];
            buffer.filled(count);
        }
        let mut out = vec![0; odd.len()];
        assert!(buffer.hand_out(&mut out) < 1000);
        assert!(buffer.room().len() >= READ_BYTES);
    }
}

#[test]
fn the_end_of_the_stream_is_the_end_whatever_was_begun() {
    let header = content_header(flag("message_id"), &short(b"\xff"));
    let heartbeat = frame(HEARTBEAT, &[]);
    assert!(read_at_once(&[]).is_empty());
    for cut in 1..header.len() {
        let read = read_through(&[&heartbeat, &header[..cut]].concat(), &[0, 3], 10);
        assert_eq!(read, heartbeat, "a header cut at {cut} is not passed");
    }
    let body = frame(BODY, b"body");
    assert_eq!(read_at_once(&body[..body.len() - 2]), body[..body.len() - 2]);
    // A broker that wants another protocol says so outside of frames.
    assert_eq!(read_at_once(b"AMQP\0\0\x09\x01"), b"AMQP\0\0\x09\x01");
}

fn any_bytes(most: usize) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..most)
}

/// A frame that needs no mending.
fn good_frame() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        any_bytes(300).prop_map(|payload| frame(FrameHead::METHOD, &[&[0, 60, 0, 80], &payload[..]].concat())),
        ("[a-zé]{0,40}", "[a-zé]{0,40}").prop_map(|(exchange, key)| deliver(exchange.as_bytes(), key.as_bytes())),
        "[a-zé]{0,90}".prop_map(|id| content_header(flag("message_id"), &short(id.as_bytes()))),
        (1..70_000_usize).prop_map(|bytes| frame(BODY, &vec![FrameHead::CONTENT_HEADER; bytes])),
        Just(frame(HEARTBEAT, &[])),
        Just(content_header(ALL_FLAGS, &everything())),
    ]
}

/// Properties as a producer might make them, then cut and changed here and there.
fn odd_properties() -> impl Strategy<Value = (u16, Vec<u8>)> {
    let edit = (any::<prop::sample::Index>(), any::<u8>());
    let whole = prop_oneof![
        Just((ALL_FLAGS, everything())),
        ("[a-z]{0,9}", any_bytes(20)).prop_map(|(key, value)| (flag("headers"), headers(key.as_bytes(), &value))),
        (any::<u16>(), any_bytes(200)),
    ];
    (whole, prop::collection::vec(edit, 0..4)).prop_map(|((flags, mut properties), edits)| {
        for (at, byte) in edits.into_iter().filter(|_| !properties.is_empty()).collect::<Vec<_>>() {
            let at = at.index(properties.len());
            properties[at] = byte;
            if byte < 16 {
                properties.truncate(at);
                break;
            }
        }
        (flags, properties)
    })
}

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases(200))]

    #[test]
    fn good_frames_pass_however_the_stream_is_cut(
        frames in prop::collection::vec(good_frame(), 1..12),
        sizes in prop::collection::vec(prop_oneof![0..20_usize, 1..3000_usize, 1..200_000_usize], 1..8),
        out_bytes in prop_oneof![1..20_usize, 1..200_000_usize],
    ) {
        prop_assume!(sizes.iter().any(|size| *size > 0));
        let stream = frames.concat();
        prop_assert!(read_through(&stream, &sizes, out_bytes) == stream, "{sizes:?} {out_bytes}");
    }

    #[test]
    fn odd_frames_are_mended_the_same_however_the_stream_is_cut(
        frames in prop::collection::vec(prop_oneof![
            good_frame(),
            odd_properties().prop_map(|(flags, properties)| content_header(flags, &properties)),
            any_bytes(40).prop_map(|key| deliver(b"\xff", &key)),
        ], 1..12),
        sizes in prop::collection::vec(1..3000_usize, 1..8),
    ) {
        let one_by_one: Vec<u8> = frames.iter().flat_map(|frame| read_at_once(frame)).collect();
        prop_assert!(read_through(&frames.concat(), &sizes, 999) == one_by_one, "{sizes:?}");
    }
}

proptest! {
    #![proptest_config(cases(5000))]

    #[test]
    fn lapin_reads_what_comes_out_and_what_it_could_read_is_not_replaced((flags, properties) in odd_properties()) {
        let sent = content_header(flags, &properties);
        let read = read_at_once(&sent);
        prop_assert!(lapin_reads(&read).is_ok());
        if flags & !ALL_FLAGS == 0 && lapin_reads(&sent).is_ok() {
            prop_assert_eq!(read, sent);
        }
    }
}

fn message(body_bytes: usize) -> Vec<u8> {
    let size = u64::try_from(body_bytes).unwrap().to_be_bytes();
    let header = frame(FrameHead::CONTENT_HEADER, &[&[0, 60, 0, 0], &size[..], &[0, 0]].concat());
    [deliver(b"", b"q"), header, frame(BODY, &vec![7; body_bytes])].concat()
}

/// Reads what there is; whether the reader waits for the allowance then.
fn read_on<S: AsyncRead + Unpin>(guarded: &mut Guarded<S>, into: &mut Vec<u8>) -> bool {
    let mut part = [0; 512];
    loop {
        match Pin::new(&mut *guarded).poll_read(&mut Context::from_waker(noop_waker_ref()), &mut part) {
            Poll::Ready(Ok(0)) => return false,
            Poll::Ready(read) => into.extend_from_slice(&part[..read.unwrap()]),
            Poll::Pending => return true,
        }
    }
}

#[test]
fn messages_beyond_the_allowance_are_read_when_those_before_them_are_done_with() {
    let sizes = [600, 400, 1, 5000, 2000, 10];
    let bytes: Vec<u8> = sizes.into_iter().flat_map(message).collect();
    for piece in [1, 7, 100_000] {
        // Of the first two and no more: with what stands beside a body of 1 byte, the third takes hundreds.
        let allowance = Allowance::new(message_bytes(600, 14, 0) + message_bytes(400, 14, 0) + 100);
        let pieces = [piece];
        let stream = Pieces { bytes: &bytes, sizes: pieces.iter().cycle() };
        let (cork, overheard) = (Cork::default(), Overheard::default());
        let mut guarded = Guarded::new(stream, Lifeline::default(), cork, allowance.clone(), overheard);
        let mut read = Vec::new();
        let behind = |count: usize| -> usize { sizes[..count].iter().map(|size| message(*size).len()).sum() };
        // What is behind the last message that was let through: the head of the next one's delivery.
        let deliver_bytes = deliver(b"", b"q").len();

        assert!(read_on(&mut guarded, &mut read));
        assert_eq!(read.len(), behind(2) + deliver_bytes);
        drop(allowance.next_share());
        // The second and the third are in use now, and 5,000 bytes pass only alone.
        assert!(read_on(&mut guarded, &mut read));
        assert_eq!(read.len(), behind(3) + deliver_bytes);
        let (second, third) = (allowance.next_share(), allowance.next_share());
        let copy = third.again();
        drop((second, third));
        assert!(read_on(&mut guarded, &mut read));
        assert_eq!(read.len(), behind(3) + deliver_bytes, "a copy counts as its message does");
        drop(copy);
        assert!(read_on(&mut guarded, &mut read));
        assert_eq!(read.len(), behind(4) + deliver_bytes);
        drop(allowance.next_share());
        assert!(read_on(&mut guarded, &mut read));
        drop(allowance.next_share());
        assert!(!read_on(&mut guarded, &mut read));
        assert_eq!(read, bytes);
    }
}

/// An array of nothing: a byte on the wire, a structure in memory.
#[test]
fn a_message_is_charged_for_what_its_headers_become_in_memory() {
    const VALUES: usize = 60_000;
    let with = |value: &[u8]| {
        let properties = headers(b"k", value);
        [deliver(b"", b"q"), content_header(flag("headers"), &properties)].concat()
    };
    let plain = message_bytes(1_234_567, 14 + 4 + 3, 1);
    let voids = [b"A", &sized(&vec![b'V'; VALUES])[..]].concat();
    for (value, times) in [(&b"V"[..], 10), (&voids, 1)] {
        let bytes = with(value).repeat(10);
        let allowance = Allowance::new(10 * plain);
        let stream = Pieces { bytes: &bytes, sizes: [100_000].iter().cycle() };
        let (cork, overheard) = (Cork::default(), Overheard::default());
        let mut guarded = Guarded::new(stream, Lifeline::default(), cork, allowance.clone(), overheard);
        let mut read = Vec::new();
        assert_eq!(read_on(&mut guarded, &mut read), times < 10);
        let read_headers = (read.len() - usize::from(times < 10) * deliver(b"", b"q").len()) / with(value).len();
        assert_eq!(read_headers, times, "{} bytes", value.len());
    }
}

/// Tells when it is written to or flushed.
struct Telling(std::sync::mpsc::Sender<&'static str>);

impl AsyncWrite for Telling {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.0.send("written").unwrap();
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.send("flushed").unwrap();
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[test]
fn nothing_is_flushed_or_written_while_the_cork_is_in() {
    const SILENCE: Duration = Duration::from_millis(50);
    for told in ["flushed", "written"] {
        let (tell, tells) = std::sync::mpsc::channel();
        let cork = Cork::default();
        let (allowance, overheard) = (Allowance::unlimited(), Overheard::default());
        let mut guarded = Guarded::new(Telling(tell), Lifeline::default(), cork.clone(), allowance, overheard);
        let put_in = cork.put_in();
        let writing = std::thread::spawn(move || {
            let (guarded, mut cx) = (Pin::new(&mut guarded), Context::from_waker(noop_waker_ref()));
            match told {
                "flushed" => guarded.poll_flush(&mut cx).is_ready(),
                _ => guarded.poll_write(&mut cx, b"frames").is_ready(),
            }
        });
        assert!(tells.recv_timeout(SILENCE).is_err(), "{told}");
        drop(put_in);
        assert_eq!(tells.recv(), Ok(told));
        assert!(writing.join().unwrap());
    }
}
