import test from 'ava';

test('same', t => t.pass());
test('alpha', t => t.fail());
