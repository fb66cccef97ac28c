// No JavaScript.
import test from 'ava';

test('never declared' t => t.pass());
