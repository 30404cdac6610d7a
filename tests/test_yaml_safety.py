"""What a configuration file must not be able to do: run code, hang, exhaust memory, or mean something else than it says"""
import importlib.util, math, os, re, subprocess, sys, time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from visdet.core.basics import ConfigError
from visdet.core.tree import Source, find, leaves
from visdet.core.yaml import MAX_BYTES, edit_yaml, read_yaml, write_yaml

SRC = Source('file', 'a.yaml')
N = MAX_BYTES - 64

def refusal(text, **kw):
    "The message with which `text` is refused, within a second of the processor's time"
    t = time.process_time()
    with pytest.raises(ConfigError) as e: read_yaml(text=text, source=SRC, **kw)
    assert time.process_time() - t < 1
    return str(e.value)

def bomb(n, width, item):
    names = 'abcdefghijklmnopqrstuvwxyz'[:n]
    return f'a: &a {item}\n' + ''.join(f'{y}: &{y} [{", ".join([f"*{x}"]*width)}]\n' for x,y in zip(names, names[1:]))

ATTACKS = {
    'billion laughs': (bomb(10, 10, '["lol"]'), 'once aliases are expanded'),
    'quadratic aliases': ('a: &a [' + '1,'*5000 + ']\nb: [' + '*a,'*5000 + ']', 'once aliases are expanded'),
    'bomb of mappings': ('a: &a {x: 1}\n' + ''.join(f'{y}: &{y} {{p: *{x}, q: *{x}}}\n' for x,y in zip('abcdefghijklmnopqrst', 'bcdefghijklmnopqrstu')), 'once aliases are expanded'),
    'aliases that nest': ('a0: &a0 [1]\n' + ''.join(f'a{i+1}: &a{i+1} [*a{i}]\n' for i in range(200)), 'nested deeper than 64 levels once aliases'),
    'brackets': ('['*N, 'a.yaml:1:65: nested deeper than 64'),
    'braces': ('{a: '*(N//4), 'nested deeper than 64'),
    'dashes': ('- '*(N//2), 'nested deeper than 64'),
    'indentation': ('\n'.join(' '*i + 'a:' for i in range(900)), 'a.yaml:65:65: nested deeper than 64'),
    'question marks': ('? '*(N//2), 'a.yaml:1:3: a key must be a single string'),
    'too many bytes': ('a: ' + 'x '*MAX_BYTES, 'a.yaml: more than 524,288 bytes'),
    'too many lines': ('\n'*(MAX_BYTES//2), 'more than 20000 lines'),
    'too many values': ('[' + '1,'*20_000 + ']', 'more than 12000 values'),
    'long tag': ('!' + 'a'*N, 'a.yaml:1:1: a word of'),
    'long tag in brackets': ('[1,!' + '%41'*(N//3-2), 'a.yaml:1:1: a word of'),
    'huge integer': ('a: ' + '9'*5000, 'a.yaml:1:4: the integer does not fit'),
    '65 bits': ('a: 18446744073709551616', 'a.yaml:1:4: the integer does not fit'),
    'huge hexadecimal': ('a: 0x' + 'f'*30, 'the integer does not fit'),
    'overflow': ('a: 1e999', 'a.yaml:1:4: 1e999 overflows; write .inf'),
    'underflow': ('a: -1e-999', 'a.yaml:1:4: -1e-999 underflows'),
    'not a number': ('a: [1, .NaN]', 'a.yaml:1:8: NaN'),
    'duplicate key': ('a:\n  lr: 1\n  "lr": 2', "a.yaml:3:3: the key 'lr' stands twice in one mapping, first at a.yaml:2:3"),
    'duplicate key in braces': ('{a: 1, b: 2, a: 3}', "a.yaml:1:14: the key 'a' stands twice"),
    'duplicate number as a key': ('0: a\n"0": b', "the key '0' stands twice"),
    'duplicate anchor': ('- &x 1\n- &x 2', 'a.yaml:2:3: the anchor &x is defined twice'),
    'recursive list': ('a: &a [*a]', 'a.yaml:1:8: the anchor &a contains itself'),
    'recursive mapping': ('&a\nb: {c: *a}', 'the anchor &a contains itself'),
    'unknown alias': ('a: *b', 'a.yaml:1:4: the alias *b has no anchor'),
    'alias as a key': ('a: &x y\n*x : 1', 'a.yaml:2:1: a key must be a single string'),
    'merge key': ('a: &a {b: 1}\nc:\n  <<: *a', 'a.yaml:3:3: the merge key <<'),
    'python object': ('!!python/object/apply:os.system ["true"]', 'a.yaml:1:1: a tag (tag:yaml.org,2002:python/object/apply:os.system)'),
    'python name': ('a: !!python/name:os.system', 'a.yaml:1:4: a tag'),
    'python module': ('a: !!python/module:os', 'a.yaml:1:4: a tag'),
    'python tuple': ('a: !!python/tuple [1, 2]', 'a.yaml:1:4: a tag'),
    'python by its whole name': ('a: !<tag:yaml.org,2002:python/object/new:os.system> x', 'a tag'),
    'own tag': ('a: !mine 1', 'a.yaml:1:4: a tag (!mine)'),
    'standard tag': ('a: !!str 1', 'a.yaml:1:4: a tag'),
    'binary': ('a: !!binary aGk=', 'a tag'),
    'tag on a key': ('!!str a: 1', 'a key cannot have a tag'),
    'anchor on a key': ('&k a: 1', 'a key cannot have a tag or an anchor'),
    'tag directive': ('%TAG ! tag:yaml.org,2002:python/\n---\na: !object 1', 'a directive'),
    'other YAML': ('%YAML 1.1\n---\na: no', 'a directive'),
    'two documents': ('a: 1\n---\nb: 2', 'a.yaml:2:1: a second document'),
    'two documents by dots': ('a: 1\n...\nb: 2', 'a.yaml:3:1: a second document'),
    'true as a key': ('true: 1', 'a.yaml:1:1: the key true is not a string'),
    'nothing as a key': ('~: 1', 'the key ~ is not a string'),
    'fraction as a key': ('a: {1.5: 1}', 'a.yaml:1:5: the key 1.5 is not a string'),
    'odd number as a key': ('007: 1', 'the key 007 is not a string'),
    'overflow as a key': ('1e999: 1', 'the key 1e999 is not a string'),
    'list as a key': ('? [a, b]\n: 1', 'a.yaml:1:3: a key must be a single string'),
    'mapping as a key': ('{{a: b}: c}', 'a.yaml:1:2: a key must be a single string'),
    'tab indents': ('a:\n\tb: 1', 'a.yaml:2:1: a tab where only spaces may stand'),
    'tab later': ('a:\n  b: 1\n\tc: 2', 'a.yaml:3:1: a tab'),
    'tabs only': ('\t'*N, 'a tab'),
    'NUL': (b'a: 1\nb: x\0y', 'a.yaml:2:5: a NUL character'),
    'NUL as an escape': ('a: "x\\0y"', 'a.yaml:1:4: the text contains a NUL'),
    'NUL in a key': ('"a\\0": 1', 'NUL'),
    'half a surrogate pair': ('a: "\\ud800"', 'a.yaml:1:4: the text contains half of a surrogate pair'),
    'raw surrogate': ('a: \ud800', 'the invisible character U+D800'),
    'beyond Unicode': ('a: "\\U00110000"', 'a.yaml:1:'),
    'control character': ('a: \x1b[31m', 'the invisible character U+001B'),
    'line separator': ('a: b\u2028c: d', 'the invisible character U+2028'),
    'byte order mark inside': ('a: \ufeff1', 'a.yaml:1:4: the invisible character U+FEFF'),
    'latin-1': ('a: é'.encode('latin-1'), 'a.yaml:1:4: byte 0xe9 is not UTF-8'),
    'utf-16': ('a: 1'.encode('utf-16'), 'is not UTF-8'),
    'utf-32': (b'\xff\xfe\0\0a\0\0\0', 'is not UTF-8'),
    'overlong UTF-8': (b'a: \xc0\x80', 'a.yaml:1:4: byte 0xc0 is not UTF-8'),
    'surrogates in UTF-8': (b'a: \xed\xa0\x80', 'is not UTF-8'),
    'JPEG': (b'\xff\xd8\xff\xe0\0\x10JFIF', 'is not UTF-8'),
    'open quote': ('a: 1\nb: "x\nc: 2', 'a.yaml:2:4: a quote is never closed'),
    'open bracket': ('a: [1, 2', 'a bracket is never closed'),
    'second colon': ('a: b: c', "a.yaml:1:5: a second ': '"),
    'bad indentation': ('a:\n  b: 1\n c: 2', 'a.yaml:3:2: the indentation'),
    'unknown escape': ('a: "\\z"', 'a.yaml:1:'),
    'reserved character': ('a: @x', 'a.yaml:1:4: a character that cannot start a value'),
}

@pytest.mark.parametrize('name', ATTACKS)
def test_attack_is_refused(name):
    text, want = ATTACKS[name]; got = refusal(text)
    assert want in got
    assert got.startswith('a.yaml'), got
    if not re.search('bytes|lines', want): assert re.match(r'a\.yaml:\d+:\d+: ', got), got
    assert len(got) < 400

def test_large_and_odd_files_are_refused_unread(tmp_path):
    big = tmp_path/'big.yaml'; big.touch(); os.truncate(big, 100_000_000); t = time.process_time()
    with pytest.raises(ConfigError, match='big.yaml: more than'): read_yaml(big)
    assert time.process_time() - t < 1
    os.mkfifo(tmp_path/'pipe')
    for p in (tmp_path/'pipe', '/dev/zero', tmp_path, tmp_path/'none.yaml', 'a\0b', tmp_path/'big.yaml'/'x'):
        with pytest.raises(ConfigError): read_yaml(p)
    with pytest.raises(ConfigError, match='Did you mean big.yaml'): read_yaml(tmp_path/'bih.yaml')

def test_slowest_texts_that_are_allowed_are_quick():
    for text in ('a: ' + 'b '*(N//2-2), '- "' + 'a b '*(N//4-2) + '"', '#\n'*9999, '[' + 'a, '*11_900 + ']', ''.join(f'k{i}: &a{i} x\n' for i in range(9000)), '"' + '\\x41'*2000 + '"'):
        t = time.process_time(); read_yaml(text=text); assert time.process_time() - t < 2

@pytest.mark.parametrize('text,value', [
    ('', None), ('# only a comment', None), ('---\n', None), ('\ufeffa: 1', {'a': 1}), ('a: 1\r\nb: [x,\r\n  y]\r\n', {'a': 1, 'b': ['x', 'y']}), ('a: .inf\nb: -.inf', {'a': math.inf, 'b': -math.inf}),
    ('a: 3e-4\nb: 1E5\nc: 1e+5\nd: .5\ne: 5.', {'a': 3e-4, 'b': 1e5, 'c': 1e5, 'd': .5, 'e': 5.}), ('[yes, no, on, off, y, n]', ['yes', 'no', 'on', 'off', 'y', 'n']),
    ('[0o17, 0x1F, 017, 1_0, 0b1, 1:20]', [15, 31, 17, '1_0', '0b1', '1:20']), ('[2001-01-01, 1.2.3, "1", \'2\']', ['2001-01-01', '1.2.3', '1', '2']),
    ('a: ${b.c}\nd: ${env:HOME}', {'a': '${b.c}', 'd': '${env:HOME}'}), ('0: a\n-1: b\n"2": c', {'0': 'a', '-1': 'b', '2': 'c'}), ('18446744073709551615', 2**64-1), ('%YAML 1.2\n---\na: 1\n...\n', {'a': 1}),
    ('"<<": 1', {'<<': 1}), ('a: &x [1, {b: 2}]\nc: *x\nd: [*x, *x]', {'a': [1, {'b': 2}], 'c': [1, {'b': 2}], 'd': [[1, {'b': 2}]]*2}), ('a: "\\u2028"', {'a': '\u2028'}),
])
def test_what_is_read(text, value):
    assert read_yaml(text=text).plain() == value

def test_aliases_are_copies():
    t = read_yaml(text='a: &x {b: [1]}\nc: *x'); a, c = t.value['a'], t.value['c']
    assert a is not c and a.value['b'] is not c.value['b'] and a.value['b'].value[0] is not c.value['b'].value[0]

def test_every_value_knows_its_place():
    t = read_yaml(text='a: 1\nb:\n  - x\n  - {c: y}\n', source=SRC)
    assert {str(n.source) for _,n in leaves(t)} == {'a.yaml:1:4', 'a.yaml:3:5', 'a.yaml:4:9'}
    assert str(find(t, 'b[1].c').at) == 'a.yaml:4:6' and str(find(t, 'b').at) == 'a.yaml:2:1'

def test_no_constructor_of_the_library_runs(monkeypatch):
    import ruamel.yaml.constructor as c
    for k in [o for o in vars(c).values() if isinstance(o, type) and o.__module__ == c.__name__]:
        for name in [n for n in vars(k) if n.startswith('construct_')]: monkeypatch.setattr(k, name, lambda *a, **kw: pytest.fail('constructed'))
    assert read_yaml(text='a: [1, {b: 2001-01-01}]').plain() == {'a': [1, {'b': '2001-01-01'}]}

quick = settings(max_examples=100, phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink], deadline=None, suppress_health_check=list(HealthCheck))

@quick
@given(st.binary(max_size=200) | st.text(max_size=200) | st.text(alphabet='ab01.e-+~:,[]{}#&*!|>\'"%@`? \n\t\r\\<x_$', max_size=80))
def test_random_input_is_read_or_refused(data):
    try: node = read_yaml(text=data, source=SRC)
    except ConfigError as e: assert str(e).startswith('a.yaml')
    else: assert read_yaml(text=write_yaml(node)).plain() == node.plain()

hard = ['no', 'yes', 'on', 'off', 'y', 'null', 'Null', '~', '', '1e3', '3e-4', '0x10', '0o7', '007', '1_000', '1:30', '2026-01-31', '2026-01-31 10:00:00', '.inf', '.nan', '-', '--', '---', '...', '-1', '+1', '.5', '5.', '<<', '=', '${x}', '$${x}', '${env:A,b}', '$ref', '_base_',
        'a: b', 'a:', ':a', '#a', 'a #b', 'a#b', '- a', '? a', '! a', '&a', '*a', '|', '>', '%a', '@a', '`a', '[a]', '{a}', 'a,b', '"a"', "'a'", "it's", '\\', '\\n', 'a\nb', 'a\nb\n', 'a\n\n', '\na', ' a', 'a ', '\ta', 'a\t', 'a\r\nb', ' a\nb', 'a\n b', 'a \nb', '# a\nb', '\n', ' \n ',
        'naïve', '犬', '🦊', '\u2028', '\x85', '\xa0', '\ufeff', '\x7f', '\x1b', '\ufffe', 'e\u0301', 'x'*2000, 'true', 'True', 'TRUE', 'none', 'None', 'a'*95 + ', b', 'C:\\x', 'http://h/x#y', 'hf://a/b@c/d.yaml', 'a: b\nc: d', '- a\n- b', '---\na', '%a\nb', 'a\n---\nb', '\u3000', '\u3000a']
chars = st.characters(exclude_categories=['Cs'], exclude_characters='\0')
strings = st.sampled_from(hard) | st.text(chars, max_size=20) | st.text(alphabet='ab1 \n:#-\'"\t,.', max_size=12)
scalars = st.none() | st.booleans() | st.integers(-2**64+1, 2**64-1) | st.floats(allow_nan=False) | strings
keys = strings.filter(lambda s: len(s) < 100)
trees = st.recursive(scalars, lambda o: st.lists(o, max_size=5) | st.dictionaries(keys, o, max_size=5), max_leaves=20)

def same(a, b):
    "Equal in value and in type, all the way down"
    if type(a) is not type(b): return False
    if isinstance(a, dict): return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list): return len(a) == len(b) and all(map(same, a, b))
    return a == b and (not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b))

@quick
@given(trees)
def test_written_and_read_back_is_the_same(tree):
    text = write_yaml(tree, header='of a test')
    assert same(read_yaml(text=text).plain(), tree), text

@pytest.mark.parametrize('s', hard)
def test_hard_strings_survive_everywhere(s):
    for tree in (s, [s], [[s]], {'a': s}, {'a': [s, s]}, {'a': {'b': s}}, [{'a': s}, s], {'a': [{'b': s, 'c': s}]}, *([{s: 1}, {s: {s: s}}, [{s: [s]}]] if len(s) < 100 else [])):
        text = write_yaml(tree); assert same(read_yaml(text=text).plain(), tree), text

@quick
@given(trees)
def test_other_readers_agree(tree):
    yaml = pytest.importorskip('ruamel.yaml'); text = write_yaml(tree)
    def floats(o): return {k: floats(v) for k,v in o.items()} if isinstance(o, dict) else [floats(v) for v in o] if isinstance(o, list) else o
    assert floats(yaml.YAML(typ='safe', pure=True).load(text)) == tree

paths = [('lr',), ('model', 'depth'), ('model', 'new'), ('tfms', 0, 'p'), ('tfms', 1), ('flow', 'b', 0), ('new', 'deep', 'key'), ('empty',), ('empty', 'x'), ('none', 'y'), ('text',), ('text2',)]
LAYOUT = '''# first
lr:  0.1   # the rate

model:   # its parts
  type: fcos
  depth: 50 # not 101

  # about the list
tfms:
- type: Flip
  p: 0.5
-   {type: Resize,  size: [1, 2]}
flow: {a: 1,   b: [ 1, 2 ]}
none:
empty: {}
text: |
  one

  two
text2: >-
  three
  four
# last
'''

@settings(quick, max_examples=60)
@given(st.dictionaries(st.sampled_from(paths), trees, min_size=1, max_size=3))
def test_edits_change_only_what_they_name(tmp_path_factory, changes):
    f = tmp_path_factory.mktemp('e')/'a.yaml'; f.write_text(LAYOUT, encoding='utf-8'); want = read_yaml(f).plain(); done = []
    for p,v in changes.items():
        before = f.read_text(encoding='utf-8')
        try: edit_yaml(f, {p: v})
        except ConfigError as e:
            assert 'single value' in str(e) or "unknown key" in str(e) or 'nothing named' in str(e) or 'beyond a list' in str(e) or 'unknown element' in str(e), e
            assert f.read_text(encoding='utf-8') == before
        else: done.append(p)
    text = f.read_text(encoding='utf-8')
    assert text.startswith('# first\nlr:') and text.endswith('# last\n')
    for p in done:
        o = read_yaml(f).plain()
        if not any(q != p and (q == p[:len(q)] or p == q[:len(p)]) for q in changes):
            for k in p: o = o[k]
            assert same(o, changes[p])
    if 'model' not in {p[0] for p in changes}: assert 'model:   # its parts\n  type: fcos\n  depth: 50 # not 101\n\n  # about the list\n' in text
    assert {k: v for k,v in read_yaml(f).plain().items() if k not in {p[0] for p in changes}} == {k: v for k,v in want.items() if k not in {p[0] for p in changes}}

def test_an_edit_that_would_change_more_is_not_written(tmp_path):
    f = tmp_path/'a.yaml'
    for text, path in (('a: &x 1\nb: *x\n', 'a'), ('a: &x {c: 1}\nb: *x\n', 'b.c'), ('a: &x {c: 1}\nb: *x\n', 'a.c')):
        f.write_text(text)
        with pytest.raises(ConfigError): edit_yaml(f, {path: 2})
        assert f.read_text() == text

def test_reading_is_light():
    code = "import sys, visdet.core.tree, visdet.core.yaml, visdet.core.fetch; visdet.core.yaml.read_yaml(text='a: 1'); print([m for m in ('torch', 'fastai', 'numpy', 'pandas', 'fastcore.utils') if m in sys.modules])"
    if not importlib.util.find_spec('visdet.core.fetch'): pytest.skip('fetch is not there')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
