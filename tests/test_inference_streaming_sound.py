"""Sound that is streamed: the bytes of the whole, whatever sizes its frames come in, and the decoder's own sound."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmllm.inference.pacing import Pace, PacedStream, Said, paced
from mmllm.inference.sound_files import StreamEncoder, encode_sound, to_pcm
from mmllm.inference.streaming_sound import FIRST_FRAMES, SoundStream, decode_in_chunks, next_border, sound_of
from mmllm.inference.voices import Recording
from mmllm_tokenizers.alignment import WordTime
from mmllm_tokenizers.audio import AudioTokenizer, EncodecTokenizer, SmallCodec, load_audio
from mmllm_tokenizers.codec import Codec, CodecConfig
from mmllm_tokenizers.encodec_tokenizer import RELEASES, _build
from mmllm_tokenizers.folder import TokenizerConfig, TokenizerFolder
from mmllm_tokenizers.pointer import PointerRule, Spelling
from mmllm_tokenizers.source_filter import SourceFilterDecoder
from mmllm_tokenizers.tempo import OverlapAdd, Stretch, at_rate, overlap_add
from mmllm_tokenizers.text import TextTokenizer
from tests.inference_fixtures import RATE, make

SMALL = CodecConfig(num_filters=4, ratios=(8, 8), dimension=8, num_codebooks=3, codebook_size=12)
CODECS = {
    "source_filter": CodecConfig(
        decoder="source_filter", num_bands=20, dimension=23, num_codebooks=3, codebook_size=12, decoder_hidden_size=8
    ),
    "seanet": SMALL,
    "odd seanet": replace(SMALL, ratios=(3, 5, 2), num_residual_layers=2),
    "causal seanet": replace(SMALL, causal=True),
    "seanet with an LSTM": replace(SMALL, lstm_layers=2),
}
TEXT = "a red - circle above two blue squares"


def tokenizer_of(audio: AudioTokenizer) -> TokenizerFolder:
    text = TextTokenizer.train([TEXT] * 3, vocab_size=300)
    return TokenizerFolder(text, audio, TokenizerConfig(image_tokens=4, image_size=16, audio_pool=2))


def make_audio(name: str) -> AudioTokenizer:
    """Random weights of about the size of trained ones."""
    torch.manual_seed(0)
    if name.startswith("encodec"):
        return EncodecTokenizer(name, _build(RELEASES[name]).state_dict(), num_codebooks=2)
    codec = Codec(CODECS[name])
    with torch.no_grad():
        for part_name, parameter in codec.decoder.named_parameters():
            if part_name.startswith("head."):  # that of a source-filter decoder begins at zero
                parameter.normal_(std=0.1)
    return SmallCodec(codec)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, TokenizerFolder]:
    return {name: tokenizer_of(make_audio(name)) for name in (*CODECS, "encodec_24khz", "encodec_48khz")}


def make_codes(tokenizer: TokenizerFolder, num_frames: int, seed: int = 0) -> torch.Tensor:
    audio = tokenizer.require_audio()
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, audio.codebook_size, (audio.num_codebooks, num_frames)))


def streamed(stream: SoundStream, codes_KF: torch.Tensor, sizes: Sequence[int], **pointer: torch.Tensor) -> np.ndarray:
    """What comes of frames that are pushed in turn, of these sizes again and again."""
    pieces, frame, turn = [], 0, 0
    while frame < codes_KF.shape[1]:
        stop = frame + sizes[turn % len(sizes)]
        pieces.append(stream.push(codes_KF[:, frame:stop], **{n: x[frame:stop] for n, x in pointer.items()}))
        frame, turn = stop, turn + 1
    return np.concatenate([*pieces, stream.finish()])


# ------------------------------------------------------------------------------------------------------------- decoding
@pytest.mark.parametrize("name", [*CODECS, "encodec_24khz"])
def test_pieces_are_the_decoders_own_sound(tokenizers, name):
    tokenizer = tokenizers[name]
    audio, lookahead = tokenizer.require_audio(), tokenizer.require_audio().decoder_stream().lookahead
    for num_frames in (1, FIRST_FRAMES, 7, FIRST_FRAMES + lookahead, FIRST_FRAMES + lookahead + 1, 64):
        codes_KF = make_codes(tokenizer, num_frames, seed=num_frames)
        whole_T, chunks_T = audio.decode(codes_KF).numpy(), decode_in_chunks(codes_KF, tokenizer)
        assert chunks_T.dtype == np.float32 and whole_T.shape == chunks_T.shape
        np.testing.assert_allclose(chunks_T, whole_T, rtol=0, atol=2e-4 * np.abs(whole_T).max())
    assert decode_in_chunks(make_codes(tokenizer, 0), tokenizer).shape == (0,)


@pytest.mark.parametrize("ratios", [(2, 4, 4, 5), (4, 4), (4, 4, 16)])
def test_a_frames_sound_depends_on_as_many_frames_as_it_says(ratios):
    """All weights positive: what the furthest tap sees is felt. Pitch stays, since its phase is felt for ever."""
    config = replace(CODECS["source_filter"], ratios=ratios)
    decoder = SourceFilterDecoder(config).eval().requires_grad_(False)
    before, after = (reach + decoder.network_reach for reach in decoder.filter_reach)
    torch.manual_seed(0)
    for parameter in decoder.parameters():
        parameter.uniform_(0.05, 0.3)
    decoder.head.weight[-2:] = 0.0
    latents_1CF = 0.3 * torch.randn(1, config.dimension, 81)
    latents_1CF[:, config.num_bands + 1] = 0.5
    changed_1CF = latents_1CF.clone()
    changed_1CF[:, : config.num_bands, 40] += torch.randn(config.num_bands)
    (wave_1T, _), (other_1T, _) = decoder(latents_1CF), decoder(changed_1CF)
    felt = (wave_1T[0] != other_1T[0]).nonzero() // config.hop_samples
    first, last = 40 - int(felt.min()), int(felt.max()) - 40
    # At the outermost frames windows, and impulse responses at their ends, are nearly nothing.
    assert after - 2 <= first <= after and before - 3 <= last <= before


def test_noise_and_pulses_go_on_beyond_their_tables(tokenizers):
    """The noise repeats after 65,536 samples, in the middle of a piece; the pulses' phase grows all the while."""
    tokenizer = tokenizers["source_filter"]
    codes_KF = make_codes(tokenizer, 500)
    whole_T = tokenizer.require_audio().decode(codes_KF).numpy()
    error_T = decode_in_chunks(codes_KF, tokenizer) - whole_T
    assert np.abs(error_T).max() < 1e-3 * np.abs(whole_T).max()
    assert np.square(error_T).mean() < 2e-7 * np.square(whole_T).mean(), "67 dB below"


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(CODECS)), st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 90))
def test_streamed_bytes_are_those_of_the_whole(tokenizers, name, sizes, num_frames):
    tokenizer = tokenizers[name]
    codes_KF = make_codes(tokenizer, num_frames)
    whole = to_pcm(decode_in_chunks(codes_KF, tokenizer)).tobytes()
    assert to_pcm(streamed(SoundStream(tokenizer), codes_KF, sizes)).tobytes() == whole


def test_the_first_sound_comes_early(tokenizers):
    for name in (*CODECS, "encodec_24khz"):
        stream, codes_KF = SoundStream(tokenizers[name]), make_codes(tokenizers[name], 40)
        assert stream.is_streamable
        audio = tokenizers[name].require_audio()
        wanted = max(FIRST_FRAMES + audio.decoder_stream().lookahead, audio.decoder_stream().min_frames)
        lengths = [len(stream.push(codes_KF[:, frame : frame + 1])) for frame in range(40)]
        assert next(frame + 1 for frame, length in enumerate(lengths) if length) == wanted <= 14
        assert lengths[wanted - 1] == (7 if name == "encodec_24khz" else FIRST_FRAMES) * audio.hop_samples
        heard = np.cumsum(lengths)[-1] // audio.hop_samples
        assert heard + len(stream.finish()) // audio.hop_samples == 40


def test_pieces_grow_and_depend_on_frames_alone():
    borders = [0]
    while borders[-1] < 400:
        borders.append(next_border(borders[-1]))
    sizes = np.diff(borders)
    assert borders[1] == FIRST_FRAMES and sizes.max() == 48 and (np.diff(sizes) >= 0).all()
    assert all(next_border(frame) == b for a, b in pairwise(borders) for frame in range(a, b))


def test_a_decoder_that_needs_all_says_so(tokenizers):
    tokenizer = tokenizers["encodec_48khz"]
    stream, codes_KF = SoundStream(tokenizer), make_codes(tokenizer, 20)
    assert not stream.is_streamable and not len(stream.push(codes_KF))
    np.testing.assert_array_equal(stream.finish(), tokenizer.require_audio().decode(codes_KF).mean(dim=0).numpy())


def test_codes_out_of_range_are_refused(tokenizers):
    stream = SoundStream(tokenizers["seanet"])
    with pytest.raises(ValueError, match=r"codes lie in \[12, 12\]; they must lie in \[0, 11\]"):
        stream.push(torch.full((3, 2), 12))
    with pytest.raises(ValueError, match=r"codes have shape \[4, 2\]"):
        stream.push(torch.zeros(4, 2, dtype=torch.int64))


# --------------------------------------------------------------------------------------------------------- pace, voices
def reference_overlap_add(wave_T: np.ndarray, tempo: float, window: int, search: int) -> np.ndarray:
    """All at once."""
    hop = window // 2
    num_frames = int(len(wave_T) / tempo / hop)
    padded_T = np.pad(wave_T, (search, window + hop + 2 * search))
    hann = np.hanning(window + 1)[:-1].astype(np.float32)
    out_T, position = np.zeros((num_frames + 1) * hop, dtype=np.float32), search
    for frame in range(num_frames):
        out_T[frame * hop : frame * hop + window] += hann * padded_T[position : position + window]
        natural = padded_T[position + hop : position + window]
        start = int((frame + 1) * hop * tempo)
        start = max(0, min(start, len(padded_T) - window - 2 * search))
        likeness = np.correlate(padded_T[start : start + hop + 2 * search], natural, mode="valid")
        position = start + int(likeness.argmax())
    return out_T


def parts_of(wave_T: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    borders = np.cumsum(np.resize(sizes, len(wave_T) // min(sizes) + 1))
    return np.split(wave_T, borders[borders < len(wave_T)])


SIZES = st.lists(st.integers(1, 3000), min_size=1, max_size=4)
LENGTHS = st.one_of(st.integers(0, 2000), st.integers(2000, 9000))


@settings(max_examples=40, deadline=None)
@given(LENGTHS, SIZES, st.sampled_from([0.25, 0.5, 0.83, 1.0, 1.3, 2.0, 4.0]))
def test_a_stretched_sound_may_come_in_pieces(num_samples, sizes, rate):
    wave_T = np.random.default_rng(num_samples).normal(0, 0.1, num_samples).astype(np.float32)
    stretch = Stretch(RATE, rate)
    pieces = [stretch.push(part_T) for part_T in parts_of(wave_T, sizes)]
    stretched_T = np.concatenate([*pieces, stretch.finish()])
    whole_T = wave_T
    if rate != 1 and num_samples:
        padded_T = np.pad(wave_T, stretch.margin, mode="symmetric")
        first = round(stretch.margin / rate)
        whole_T = reference_overlap_add(padded_T, rate, 400, 80)[first : first + round(num_samples / rate)]
    np.testing.assert_array_equal(stretched_T, whole_T)
    np.testing.assert_array_equal(at_rate(wave_T, RATE, rate), whole_T)
    assert rate != 1 or sum(map(len, pieces)) == num_samples


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 6000), SIZES, st.floats(0.2, 5.0))
def test_overlap_add_in_pieces_is_that_of_the_whole(num_samples, sizes, tempo):
    wave_T = np.random.default_rng(num_samples).normal(0, 0.1, num_samples).astype(np.float32)
    adding, whole_T = OverlapAdd(tempo, 400, 80), reference_overlap_add(wave_T, tempo, 400, 80)
    pieces = [adding.push(part_T) for part_T in parts_of(wave_T, sizes)]
    np.testing.assert_array_equal(np.concatenate([*pieces, adding.finish()]), whole_T)
    is_short = len(whole_T) < 800
    np.testing.assert_array_equal(overlap_add(wave_T, tempo, 400, 80), wave_T if is_short else whole_T)


def reference_rests(wave_T: np.ndarray, said: Said, pace: Pace) -> tuple[np.ndarray, list[int]]:
    """All at once: pieces between rests, each faded by itself. And where the rests are."""
    places: list[int] = []
    for word in sorted(word for word, seconds in pace.pauses.items() if round(seconds * RATE)):
        border = said.border(word)
        if border is None:
            places.append(-1)
            continue
        low, high = (min(round(second / pace.rate * RATE), len(wave_T)) for second in border)
        low = max([low, *places])
        size = min(80, high - low)
        powers = [np.square(wave_T[at : at + size], dtype=np.float64).sum() for at in range(low, high - size + 1)]
        quiet = [at for at, power in enumerate(powers) if power <= min(powers) + 1e-12]
        places.append(low + (quiet[len(quiet) // 2] + size // 2 if size > 0 else 0))
    silences = [round(pace.pauses[word] * RATE) for word in sorted(pace.pauses) if round(pace.pauses[word] * RATE)]
    rests = [(place, count) for place, count in zip(places, silences, strict=True) if place >= 0]
    pieces, begin = [], 0
    for place, num_silent in [*rests, (len(wave_T), 0)]:
        piece_T = wave_T[begin:place].copy()
        ramp = np.linspace(0, 1, min(40, len(piece_T)), dtype=np.float32)
        if begin > 0:
            piece_T[: len(ramp)] *= ramp
        if place < len(wave_T) and len(ramp):
            piece_T[-len(ramp) :] *= ramp[::-1]
        pieces += [piece_T, np.zeros(num_silent, np.float32)]
        begin = place
    return np.concatenate(pieces), [place for place, _ in rests]


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_rests_may_be_put_into_a_sound_that_comes_in_pieces(first):
    """Whatever is skipped, however short words are, and wherever the pieces end."""
    for seed in range(first, first + 50):
        check_rests(np.random.default_rng(seed))


def check_rests(rng: np.random.Generator) -> None:
    hop, num_letters, num_words = int(rng.choice([8, 64, 160])), len(Spelling.of(TEXT).letters_L), len(TEXT.split())
    lasting = rng.choice([0.2, 0.5, 0.8])  # the share of frames that say what the one before says
    steps = rng.choice(3, size=rng.integers(1, 120), p=[lasting, 0.8 - 0.8 * lasting, 0.2 - 0.2 * lasting])
    pointer_F = np.minimum(np.cumsum(steps), num_letters - 1)
    said = Said.of(pointer_F, TEXT, 0, RATE / hop, is_whole=bool(rng.integers(2)))
    behind = rng.permutation(np.arange(-1, num_words))[: rng.integers(1, 6)].tolist()
    pace = Pace(rate=rng.choice([1.0, 1.0, 0.5, 1.7]), pauses={word: rng.choice([0.0, 0.002, 0.1]) for word in behind})
    wave_T = rng.normal(0, 0.1, hop * len(steps)).astype(np.float32)
    sizes, lead = rng.integers(1, 20, rng.integers(1, 4)), rng.integers(0, 12)  # frames that are known beyond the sound

    wanted_T, places = reference_rests(at_rate(wave_T, RATE, pace.rate), said, pace)
    stream, pieces, frame = PacedStream(RATE, pace), [], 0
    for part_T in parts_of(wave_T, (sizes * hop).tolist()):
        frame += len(part_T) // hop
        known = slice(0, frame + lead)
        so_far = replace(said, words_F=said.words_F[known], is_letter_F=said.is_letter_F[known])
        pieces.append(stream.push(part_T, so_far))
    np.testing.assert_array_equal(np.concatenate([*pieces, stream.finish(said)]), wanted_T)
    assert [rest.place for rest in stream._rests] == places

    times = {number: said.word(number) for number in range(num_words)}
    found = {number: WordTime(TEXT.split()[number], *time) for number, time in times.items() if time is not None}
    whole_T, moved = paced(wave_T, RATE, found, said, pace)
    np.testing.assert_array_equal(whole_T, wanted_T)
    assert stream.times(found) == moved


def test_a_rest_holds_little_back(tokenizers):
    """Behind the first word of two: what is before its last letter comes at once, the rest when the next one begins."""
    hop, text = 64, "aa bb"
    pointer_F = np.array([0] + [1] * 10 + [2] * 10 + [3] * 3 + [4] * 10)  # " aa bb"
    wave_T = np.random.default_rng(0).normal(0, 0.1, hop * len(pointer_F)).astype(np.float32)
    stream, given = PacedStream(RATE, Pace(pauses={0: 0.5})), []
    for frame in range(len(pointer_F)):
        said = Said.of(pointer_F[: frame + 1], text, 0, RATE / hop, False)
        given.append(len(stream.push(wave_T[frame * hop : (frame + 1) * hop], said)))
    heard = np.cumsum(given)
    assert heard[9] >= 8 * hop and heard[20] >= 19 * hop, "while the letter lasts, all but a frame and the fade"
    assert heard[23] < 21 * hop and heard[26] > 20 * hop + 0.5 * RATE, "until the next word has been heard for a frame"


def test_speech_in_a_recordings_voice_is_streamed_too(tokenizers):
    rng = np.random.default_rng(1)
    for name in ("source_filter", "encodec_24khz", "encodec_48khz"):
        tokenizer = tokenizers[name]
        audio = tokenizer.require_audio()
        for num_before in (2, 30):
            recording = Recording(make_codes(tokenizer, num_before, seed=3), "two blue", ())
            codes_KF = make_codes(tokenizer, 40)
            pointer_F = torch.from_numpy(np.sort(rng.integers(8, 8 + len(TEXT), 40)))
            settings = {"text": TEXT, "pace": Pace(pauses={0: 0.1}), "recording": recording}
            stream = SoundStream(tokenizer, **settings)
            found_T = streamed(stream, codes_KF, (3, 1), pointer_F=pointer_F)
            whole_T, words = sound_of(codes_KF, tokenizer, pointer_F, **settings)
            np.testing.assert_array_equal(found_T, whole_T)
            assert stream.words == words and words[0].word in TEXT
            plain_T = decode_in_chunks(torch.cat([recording.codes_KF, codes_KF], dim=1), tokenizer)
            cut = round(num_before / tokenizer.frame_rate * audio.sample_rate)
            alone_T, _ = sound_of(codes_KF, tokenizer, recording=recording)
            np.testing.assert_allclose(alone_T, plain_T[cut:], rtol=0, atol=2e-4 * np.abs(plain_T).max())


@pytest.mark.parametrize("pace", [{}, {"rate": 1.3, "pauses": {-1: 0.2, 1: 0.1, 6: 0.3}}])
def test_what_the_model_speaks_is_what_it_streams(pace):
    model = make("delay", pointer=PointerRule())
    sharp = {"temperature": 1.0, "seed": 3, "max_letter_seconds": 0.1}
    text = "a red circle above two blue squares"
    spoken = model.speak(text, **sharp, **pace)
    stream = SoundStream(model.tokenizer, text, Pace(**pace))
    plain = model.speak(text, **sharp)
    np.testing.assert_array_equal(plain.codes_KF, spoken.codes_KF)
    if not pace:
        np.testing.assert_array_equal(streamed(stream, torch.from_numpy(spoken.codes_KF), (1,)), spoken.samples)
        whole_T = model.tokenizer.require_audio().decode(torch.from_numpy(spoken.codes_KF)).numpy()
        np.testing.assert_allclose(spoken.samples, whole_T, rtol=0, atol=1e-4 * np.abs(whole_T).max())
        return
    assert spoken.seconds == pytest.approx(plain.seconds / 1.3 + 0.6, abs=1e-3)
    assert [word.word for word in spoken.words] == text.split()


# ---------------------------------------------------------------------------------------------------------------- files
@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["wav", "pcm", "flac"]), SIZES, st.integers(0, 12_000))
def test_streamed_files_hold_the_samples_of_whole_ones(format, sizes, num_samples):
    samples_T = np.random.default_rng(num_samples).normal(0, 0.4, num_samples).astype(np.float32)
    encoder = StreamEncoder(RATE, format)
    pieces = [encoder.push(part_T) for part_T in parts_of(samples_T, sizes)]
    data, whole = b"".join([*pieces, encoder.finish()]), encode_sound(samples_T, RATE, format)
    pcm_T = to_pcm(samples_T)
    assert pcm_T.dtype == np.int16 and np.abs(pcm_T / 32768 - samples_T.clip(-1, 1)).max(initial=0) <= 1 / 32768
    if format == "pcm":
        assert data == whole == pcm_T.tobytes() and encoder.content_type == "audio/pcm"
        return
    assert encoder.content_type == f"audio/{format}"
    if format == "wav":
        assert data[44:] == whole[44:] == pcm_T.tobytes() and data[4:8] == data[40:44] == b"\xff" * 4
        assert all(len(piece) % 2 == 0 for piece in pieces)
    if not num_samples:
        return
    found_T, rate = soundfile.read(io.BytesIO(whole), dtype="int16")
    assert rate == RATE and (found_T == pcm_T).all()
    if format == "wav":
        wave_CT, rate = load_audio(data)  # libsndfile itself goes by the header's size
        assert rate == RATE and (to_pcm(wave_CT[0].numpy()) == pcm_T).all()
    else:
        assert (read_flac(data, num_samples) == pcm_T).all()


def read_flac(data: bytes, num_samples: int) -> np.ndarray:
    """Of a stream whose header knows no length, which soundfile doesn't read: the length is put there."""
    known, total = 0xF << 32, int.from_bytes(data[21:26], "big")  # RFC 9639, section 8.2: 36 bits
    assert data[:4] == b"fLaC" and not total & (known | 0xFFFFFFFF)
    told = data[:21] + (total | num_samples).to_bytes(5, "big") + data[26:]
    return soundfile.read(io.BytesIO(told), dtype="int16")[0]


def test_a_flac_comes_block_by_block():
    samples_T = np.random.default_rng(0).normal(0, 0.1, 24_000).astype(np.float32)
    encoder, data = StreamEncoder(RATE, "flac"), b""
    for start in range(0, 24_000, 800):
        data += encoder.push(samples_T[start : start + 800])
        num_whole = max(0, start + 800 - 2 * 1152)
        if num_whole:
            found_T = read_flac(data, num_whole)[:num_whole]
            assert (found_T == to_pcm(samples_T[:num_whole])).all(), "what has come can be played"
    assert encoder.finish()


def test_wrong_formats_and_samples_are_refused():
    for make_it in (lambda: StreamEncoder(RATE, "mp3"), lambda: encode_sound(np.zeros(3), RATE, "mp3")):  # type: ignore
        with pytest.raises(ValueError, match="the sound format is 'mp3'; it must be one of wav, pcm, flac"):
            make_it()
    with pytest.raises(ValueError, match=r"samples have shape \[2, 3\] and type float64; they must be \[samples\]"):
        encode_sound(np.zeros((2, 3)), RATE, "wav")
    with pytest.raises(ValueError, match="type int16"):
        StreamEncoder(RATE, "pcm").push(np.zeros(3, np.int16))
