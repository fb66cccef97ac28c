// Texts that are no text: half of a surrogate pair, in a title, a log, a message.
import test from 'ava';

test('half \ud83d of a title', t => t.pass());
test('half of a log', t => {
	t.log('a\ud83d');
	t.pass();
});
test('half of a message', t => t.fail('half \udc00 of it'));
test('a cut between two halves', t => {
	t.fail('a' + '\u{1F600}'.repeat(100_000));
});
