# Random statements that use buffers: the buffers, what is none, calls of every
# function, queries, and definitions.

package FuzzStatements;

use strict;
use warnings;

use Exporter 'import';
use FuzzDraws;

our @EXPORT = qw(
  $misreading @free @odd_buffers @rude %shape alteration buffer call control definition
  insertion key option query refused selection statement
);

# Does the server misread a row that was made before an attribute of its type got
# another type?  Then no session may hold one that long.
our $misreading = 0;

# --- buffers and what is not one ---------------------------------------------

my @no_buffers = qw(pg_class a_view a_table a_index a_sequence a_matview a_partitioned comp pg_toast.pg_toast_2619 a_foreign
  s_none s_one s_int s_domain s_generated s_parent);
our @odd_buffers = qw(s_wide s_hundred s_holed s_child s_partition s_trigger s_plain s_nologin s_nohandler
  s_serial s_null s_pair s_many);
our @free = map { "f_$_" } 1 .. 6;
our @rude = map { "r_$_" } 1 .. 3;

# The types of key columns of a buffer, where they can be known
our %shape = (
	(map { named('b', $_) => [$_] } @fit_types),
	(map { named('k', $_) => [$_] } @types),
	control => ['text'],
	s_holed => [ 'integer', 'text' ],
	s_child => ['text'],
	s_partition => ['text'],
	s_trigger => ['text'],
	s_plain => ['text'],
	s_nologin => ['text'],
	s_nohandler => ['text'],
	s_serial => ['integer'],
	s_null => [ 'text', 'integer' ],
	s_pair => [ 'integer', 'text' ],
	s_many => [ 'text', 'date', 'numeric', 'integer[]', 'comp', 'boolean' ],
	s_wide => [ ('integer') x 1599 ],
	s_hundred => [ ('"char"') x 98 ],
	(map { $_ => ['text'] } @rude));

# What may be counted in, to be read, flushed, stopped and truncated
sub buffer
{
	return draw(
		50 => sub { named('b', pick(@fit_types)) },
		14 => sub { pick('b_text', 'b_integer', 's_pair') },
		14 => sub { named('k', pick(@types)) },
		8 => sub { pick(@odd_buffers) },
		8 => sub { pick(@free) },
		6 => sub { pick(@rude) });
}

# An argument for a buffer; `$name' is how it would be right
sub buffer_argument
{
	my ($name) = @_;

	return draw(
		70 => "'$name'",
		8 => "'$name'::regclass",
		4 => "'public.$name'",
		4 => "(SELECT oid FROM pg_class WHERE relname = '$name' LIMIT 1)",
		3 => 'NULL',
		1 => '0',
		1 => '0::regclass',
		1 => '4294967295::oid::regclass',
		1 => '1259',
		1 => "'no such'",
		1 => "''",
		1 => '-1',
		1 => "'$name.key'",
		1 => "'pg_temp.$name'",
		3 => sub { "'" . pick(@no_buffers) . "'" });
}

# A key for a buffer, right or not
sub key
{
	my ($name) = @_;
	my $shape = $shape{$name} || [ pick(@types) ];

	return odd_key() if chance(15);
	return 'ROW(' . join(', ', map { value($_) } @$shape) . ')' if @$shape > 1;
	return value($shape->[0]);
}

# --- calls ------------------------------------------------------------------

sub seconds
{
	return draw(
		8 => "'20ms'",
		4 => "'0'",
		2 => "'-1s'",
		1 => "'infinity'",
		1 => "'178000000 years'",
		1 => 'NULL',
		1 => "'x'",
		1 => "'-1 month 30 days'");
}

# A call of one of the functions, as an expression.  In a call that repeats,
# `$g' is what counts it.
sub call
{
	my ($g) = @_;
	my $name = buffer();
	my $buffer = buffer_argument($name);
	my $key = key($name);

	$key = draw(
		3 => "'k' || $g",
		1 => $g,
		1 => "ROW($g, 'x')",
		1 => "repeat('x', $g)",
		1 => $key) if defined $g && chance(60);

	return draw(
		34 => sub { "sb_increment($key, " . count() . ", $buffer)" },
		4 => "sb_increment($key, buffer => $buffer)",
		2 => "sb_increment(key => $key, buffer => $buffer, count => " . count() . ')',
		1 => sub { "sb_increment($key, " . count() . ')' },
		1 => "sb_increment($key)",
		10 => sub { "sb_async_increment($key, " . count() . ", $buffer)" },
		2 => "sb_async_increment($key, buffer => $buffer)",
		12 => "sb_count($key, $buffer)",
		6 => "sb_flush($key, $buffer)",
		3 => "sb_flush_all($buffer)",
		2 => sub { "sb_drain($buffer, " . seconds() . ')' },
		1 => sub { "sb_start($buffer)" },
		1 => sub { chance(20) ? "sb_stop($buffer)" : "sb_start($buffer)" },
		4 => "(SELECT count(*) FROM sb_keys($buffer))",
		2 => "sb_keys($buffer)",
		1 => "sb_stat_reset($buffer)",
		2 => "sb_stat_get_buffer($buffer)",
		1 => sub { "sb_increment($key, sb_count($key, $buffer), " . buffer_argument(buffer()) . ')' });
}

sub table_of_numbers { return 'generate_series(1, ' . draw(4 => 20, 1 => 300, 1 => 0) . ')'; }

# A call somewhere in a query
sub query
{
	my $plain = call();
	my $repeated = call('g');
	my $many = table_of_numbers() . ' AS g';
	my $name = buffer();

	return draw(
		30 => "SELECT $plain",
		8 => "SELECT $plain, " . call(),
		8 => "SELECT $repeated FROM $many",
		3 => "SELECT g FROM $many WHERE ($repeated) IS NULL",
		2 => "SELECT count($repeated) FROM $many",
		2 => "SELECT count(*) FILTER (WHERE ($repeated) IS NOT NULL) OVER (ORDER BY g ROWS 2 PRECEDING) FROM $many",
		2 => "SELECT g FROM $many ORDER BY ($repeated) IS NULL, g LIMIT 3",
		2 => "SELECT ($repeated) IS NULL AS x, count(*) FROM $many GROUP BY 1 HAVING ($plain) IS NULL",
		2 => "SELECT CASE WHEN g % 2 = 0 THEN ($repeated) IS NULL ELSE ($plain) IS NULL END FROM $many",
		2 => "SELECT * FROM $many, LATERAL (SELECT ($repeated) IS NULL OFFSET 0) l",
		2 => sub { "SELECT * FROM ROWS FROM (sb_keys(" . buffer_argument($name) . '), generate_series(1, 5)) r' },
		2 => sub { "SELECT * FROM $many LEFT JOIN LATERAL sb_keys(" . buffer_argument($name) . ') k ON k.count > g' },
		2 => sub { "SELECT (k).* FROM (SELECT sb_keys(" . buffer_argument($name) . ') k) s' },
		2 => "WITH c AS MATERIALIZED (SELECT ($repeated) IS NULL AS x FROM $many) SELECT * FROM c, c AS d LIMIT 50",
		2 => "SELECT ($plain) IS NULL UNION SELECT ($repeated) IS NULL FROM $many",
		1 => "VALUES (($plain) IS NULL), (true)",
		1 => "SELECT EXISTS (SELECT $repeated FROM $many)",
		1 => "SELECT ARRAY(SELECT ($repeated) IS NULL FROM $many)",
		2 => "SELECT counted_agg(('k' || g)::text) FROM $many",
		2 => "SELECT counting('a_table ' || n) FROM a_table",
		1 => "SELECT count(*) FROM a_table WHERE counting('x') = 'x'",
		1 => "SELECT sb_increment('t' || g, 1, '$name') FROM $many WHERE try('SELECT 1 / (random() * 2)::int', g % 3) IS NOT NULL",
		1 => "SELECT counted_agg(('k' || g)::text) OVER (ORDER BY g ROWS BETWEEN 1 PRECEDING AND 1 FOLLOWING) FROM $many",
		1 => "SELECT 'a'::text ## '$name'::regclass FROM $many",
		2 => "INSERT INTO a_table SELECT g FROM $many RETURNING ($repeated) IS NULL",
		1 => "UPDATE a_table SET n = n + 1 WHERE n < 3 RETURNING ($plain) IS NULL",
		1 => "DELETE FROM a_table WHERE ($plain) IS NULL",
		1 => "CREATE TEMP TABLE IF NOT EXISTS t_made AS SELECT ($repeated) IS NULL AS x FROM $many",
		1 => "SELECT $repeated INTO TEMP t_void FROM $many",
		1 => "REFRESH MATERIALIZED VIEW a_matview",
		3 => "EXPLAIN (VERBOSE) SELECT $repeated FROM $many",
		2 => "EXPLAIN (ANALYZE, VERBOSE, BUFFERS, FORMAT JSON) SELECT $repeated FROM $many");
}

# What a SELECT can do with a buffer
sub selection
{
	my $b = chance(92) ? buffer() : pick('control', @no_buffers);
	my $c = chance(50) ? $b : buffer();

	return draw(
		10 => "SELECT * FROM $b",
		4 => "SELECT count(*), max(n), sum(n), min(key) FROM $b",
		3 => "SELECT * FROM $b WHERE key = " . value(pick(@types)),
		3 => "SELECT * FROM $b ORDER BY n DESC, key LIMIT 5 OFFSET 1",
		3 => "SELECT * FROM $b WHERE n > " . count(),
		3 => "SELECT * FROM $b x JOIN $c y ON x.n = y.n LIMIT 500",
		3 => "SELECT * FROM $b x FULL JOIN $c y ON x.key::text = y.key::text LIMIT 500",
		2 => "SELECT x FROM $b x, LATERAL (SELECT y FROM $c y WHERE y.n = x.n OFFSET 0) l LIMIT 500",
		2 => "SELECT x.*::text FROM $b x",
		2 => "SELECT tableoid::regclass, * FROM $b",
		1 => "SELECT ctid, xmin, cmin, xmax FROM $b",
		2 => "SELECT * FROM $b FOR UPDATE",
		1 => "SELECT * FROM $b FOR KEY SHARE SKIP LOCKED",
		1 => "SELECT * FROM $b TABLESAMPLE SYSTEM (50)",
		2 => "SELECT * FROM ONLY $b",
		1 => "SELECT * FROM $b b WHERE EXISTS (SELECT FROM $c c WHERE c.n < b.n) LIMIT 100",
		1 => "SELECT * FROM $b b WHERE n NOT IN (SELECT n FROM $c) LIMIT 100",
		1 => "SELECT key, sum(n) OVER (PARTITION BY n % 3 ORDER BY n) FROM $b",
		1 => "SELECT key, sum(n) FROM $b GROUP BY GROUPING SETS ((key), ())",
		1 => "SELECT DISTINCT n FROM $b UNION ALL SELECT n FROM $c",
		1 => "WITH RECURSIVE r AS (SELECT n, 1 AS d FROM $b UNION ALL SELECT b.n, d + 1 FROM r JOIN $b b USING (n)"
		  . ' WHERE d < 3) SELECT count(*) FROM (SELECT FROM r LIMIT 1000) l',
		2 => "UPDATE hot_rows SET n = hot_rows.n + 1 FROM $b b WHERE hot_rows.id = abs(b.n % 3)",
		1 => "SELECT * FROM hot_rows h JOIN $b b ON h.id = abs(b.n % 3) FOR UPDATE",
		1 => 'SELECT * FROM a_partitioned',
		1 => 'SELECT * FROM s_parent',
		1 => "SELECT * FROM v_text WHERE key <> 'x'",
		1 => "ANALYZE $b",
		1 => "VACUUM $b",
		1 => "LOCK TABLE $b IN SHARE MODE NOWAIT",
		1 => "COMMENT ON FOREIGN TABLE $b IS 'a comment'",
		3 => "EXPLAIN (ANALYZE, VERBOSE) SELECT * FROM $b x JOIN $c y USING (key)",
		1 => "EXPLAIN SELECT * FROM $b WHERE n = 1",
		4 => 'SELECT *, length(last_error), upper(last_error) FROM sb_stat_buffers',
		2 => "SELECT * FROM sb_stat_buffers s, sb_keys(relid) k WHERE s.relid = '$b'::regclass",
		3 => "SELECT k.*, length(k.last_error) FROM sb_keys('$b') k");
}

# Ways to insert
sub insertion
{
	my $b = chance(95) ? buffer() : pick(@no_buffers);
	my @shape = @{ $shape{$b} || ['text'] };
	my $row = sub {
		return @shape > 20 ? 'DEFAULT' : join(', ', (map { chance(96) ? value($_) : 'DEFAULT' } @shape),
			chance(60) ? (count()) : chance(30) ? ('DEFAULT') : ());
	};
	my $short = sub { join(', ', map { value($_) } @shape > 20 ? () : @shape) };

	return draw(
		20 => sub { "INSERT INTO $b VALUES (" . $row->() . ')' },
		6 => sub { my $n = @shape; "INSERT INTO $b VALUES " . join(', ', map { '(' . $short->() . ", $_)" } 1 .. 3) },
		4 => sub { "INSERT INTO $b SELECT " . $short->() . ', g FROM ' . table_of_numbers() . ' AS g' },
		4 => "INSERT INTO $b SELECT 'k' || g, g FROM generate_series(1, 50) AS g",
		3 => "INSERT INTO $b SELECT g, 1 FROM generate_series(1, 50) AS g",
		2 => "INSERT INTO $b SELECT * FROM $b",
		2 => sub { "INSERT INTO $b SELECT * FROM " . buffer() },
		2 => "INSERT INTO $b DEFAULT VALUES",
		2 => sub { "INSERT INTO $b (n) VALUES (" . count() . ')' },
		2 => sub { "INSERT INTO $b (key) VALUES (" . $short->() . ') RETURNING *, tableoid::regclass' },
		1 => sub { "INSERT INTO $b (key) VALUES (" . $short->() . ') RETURNING ctid, xmin' },
		2 => sub { "INSERT INTO $b VALUES (" . $short->() . ', 1) ON CONFLICT DO NOTHING' },
		1 => sub { "INSERT INTO $b VALUES (" . $short->() . ', 1) ON CONFLICT (key) DO UPDATE SET n = 1' },
		2 => "INSERT INTO $b SELECT 't' || g, 1 FROM generate_series(1, 9) AS g"
		  . " WHERE try('SELECT 1 / (random() * 2)::int', g % 3) IS NOT NULL",
		1 => "INSERT INTO v_text VALUES ('x'), ('y')",
		1 => "INSERT INTO v_text VALUES ('y', 3) RETURNING *",
		2 => "INSERT INTO a_partitioned VALUES ('x', 1), ('y', 2)",
		1 => "INSERT INTO a_partitioned VALUES ('z', 1)",
		2 => "WITH i AS (INSERT INTO $b SELECT 'w' || g, 1 FROM generate_series(1, 5) g RETURNING *) SELECT * FROM i, $b LIMIT 100",
		1 => "WITH i AS (INSERT INTO $b VALUES ('1', 1)), t AS (SELECT sb_increment('1', 2, '$b')) SELECT * FROM t",
		1 => sub { "EXPLAIN (ANALYZE, VERBOSE) INSERT INTO $b VALUES (" . $short->() . ', 1)' },
		1 => "EXPLAIN INSERT INTO $b SELECT 1",
		1 => "INSERT INTO contexts (a, c) VALUES ('x', 'y'), (DEFAULT, 'bad')",
		3 => sub { "INSERT INTO contexts (a, c) VALUES (" . value('text') . ", 'y')" },
		2 => "INSERT INTO guarded VALUES ('x'), ('y')",
		2 => "INSERT INTO triggered VALUES ('x'), ('y')",
		1 => "INSERT INTO ruled VALUES ('x')",
		1 => "INSERT INTO v_instead VALUES ('x', 1)");
}

# What is refused, or should be
sub refused
{
	my $b = buffer();

	return draw(
		3 => "UPDATE $b SET n = 1",
		3 => "DELETE FROM $b",
		2 => "MERGE INTO $b USING (VALUES ('x', 1)) v (k, c) ON key::text = k"
		  . ' WHEN MATCHED THEN DELETE WHEN NOT MATCHED THEN INSERT VALUES (k, c)',
		1 => "UPDATE $b SET n = 1 RETURNING *",
		1 => "EXPLAIN UPDATE $b SET n = 1",
		1 => "CREATE INDEX ON $b (key)",
		1 => "CREATE UNIQUE INDEX ON $b (key)",
		1 => "ALTER TABLE $b ADD PRIMARY KEY (key)",
		1 => "ALTER TABLE $b ENABLE ROW LEVEL SECURITY",
		1 => "CLUSTER $b",
		1 => "SELECT * FROM $b WHERE CURRENT OF no_cursor",
		1 => "IMPORT FOREIGN SCHEMA x FROM SERVER statbuffer INTO public",
		1 => "ALTER SERVER statbuffer OPTIONS (ADD host 'x')",
		1 => "CREATE USER MAPPING FOR PUBLIC SERVER statbuffer OPTIONS (user 'x')",
		1 => "ALTER FOREIGN DATA WRAPPER statbuffer OPTIONS (ADD a 'x')",
		1 => "TRUNCATE v_text");
}

my @handlers = qw(take take_one public.take no_such rude returns_int ambiguous a_procedure an_aggregate lag
  many_rows variadic_take default_take not_mine forbidden);

sub option
{
	my $name = pick(qw(handler interval jitter timeout backoff restart shutdown batch_size batch_time handler_timeout max_memory when_full stopped
		  durable nonsense Handler));
	my $value = draw(
		12 => sub { pick('0', '1', '10ms', '50ms', '1s', '1min', '1h', '2147483647', '24d', '100000') },
		3 => sub { pick('', '-1', 'x', '1 parsec', '2147483648', '1e30', 'NaN', '0x10', ' 5 s ', '5s;') },
		3 => sub { pick(@handlers, 'a.b.c.d', '"', 'take()', 'x' x 100) },
		2 => sub { pick('transient', 'temporary', 'TEMPORARY') },
		2 => sub { pick('true', 'false', 'off', 'maybe') });

	return ($name, $value);
}

# Options that are mostly in range, with short times
sub mild_option
{
	return draw(
		4 => sub { ('interval', pick('0', '10ms', '100ms', '1s')) },
		2 => sub { ('jitter', pick('0', '10ms')) },
		3 => sub { ('timeout', pick('0', '100ms', '1s')) },
		2 => sub { ('backoff', pick('1', '10ms', '1s')) },
		2 => sub { ('batch_size', pick(1, 2, 10, 100000)) },
		2 => sub { ('batch_time', pick('0', '1', '1s')) },
		2 => sub { ('restart', pick('transient', 'temporary')) },
		1 => sub { ('when_full', pick('error', 'discard')) },
		2 => sub { ('durable', pick('true', 'false')) },
		1 => sub { ('shutdown', pick('0', '50ms')) },
		2 => sub { ('handler_timeout', pick('0', '10ms', '1s')) });
}

sub column_type
{
	return pick(@types) if chance(70);
	return pick(qw(text bigint int8 record anyelement void no_such serial));
}

sub set_option
{
	my ($name, $value) = draw(
		12 => \&mild_option,
		7 => \&option,
		1 => sub { ('handler', pick(@handlers, ('take') x 10)) });

	return draw(
		5 => "SET $name '$value'",
		5 => "ADD $name '$value'",
		1 => "DROP $name",
		1 => "$name '$value', $name '$value'");
}

sub alteration
{
	my ($b) = @_;
	my $type = column_type();

	return "ALTER FOREIGN TABLE $b " . draw(
		8 => sub { 'OPTIONS (' . set_option() . ')' },
		3 => "ADD COLUMN c $type",
		2 => sub { "ADD COLUMN c $type NOT NULL DEFAULT " . any_value() },
		1 => sub { 'ADD COLUMN g bigint GENERATED ALWAYS AS (n * 2) STORED' },
		1 => 'ADD COLUMN i bigint GENERATED BY DEFAULT AS IDENTITY',
		3 => 'DROP COLUMN c',
		1 => 'DROP COLUMN IF EXISTS g',
		1 => 'DROP COLUMN key CASCADE',
		1 => 'DROP COLUMN n CASCADE',
		2 => "ALTER COLUMN key TYPE $type",
		1 => 'ALTER COLUMN key TYPE text',
		1 => 'ALTER COLUMN n TYPE bigint',
		1 => 'ALTER COLUMN n TYPE int',
		2 => 'ALTER COLUMN key SET NOT NULL',
		2 => 'ALTER COLUMN key DROP NOT NULL',
		1 => sub { 'ALTER COLUMN key SET DEFAULT ' . any_value() },
		1 => 'ALTER COLUMN n SET DEFAULT sb_count(\'x\', \'b_text\')',
		1 => 'ALTER COLUMN n DROP DEFAULT',
		2 => sub { 'ALTER COLUMN key SET STORAGE ' . pick(qw(PLAIN MAIN EXTERNAL EXTENDED)) },
		1 => 'ALTER COLUMN key SET STATISTICS 10',
		1 => 'ALTER COLUMN key OPTIONS (x \'y\')',
		1 => 'ALTER COLUMN c SET (n_distinct = 5)',
		2 => 'RENAME COLUMN c TO d',
		2 => 'RENAME COLUMN d TO c',
		1 => "RENAME TO ${b}_x",
		1 => 'ADD CHECK (n < 5)',
		1 => 'ADD CONSTRAINT counting CHECK (counting(\'check\') IS NOT NULL)',
		1 => 'DROP CONSTRAINT IF EXISTS counting',
		1 => sub { 'OWNER TO ' . pick('fuzz_owner', 'SESSION_USER', 'fuzz_nologin') },
		1 => 'INHERIT s_parent',
		1 => 'NO INHERIT s_parent',
		1 => 'DISABLE TRIGGER ALL',
		1 => 'SET SCHEMA other',
		1 => 'SET WITHOUT OIDS');
}

# Definitions that come and go
sub definition
{
	my $b = pick(@free);
	my $k = chance(50) ? named('k', pick(@types)) : $b;
	my $column = sub { (chance(80) ? pick(qw(key a b c)) : 'key') . ' ' . column_type() . (chance(30) ? ' NOT NULL' : '') };

	return draw(
		14 => sub { alteration($k) },
		4 => sub { alteration(pick(@rude)) },
		3 => sub { alteration(pick(@odd_buffers)) },
		3 => sub {
			my ($name, $value) = mild_option();
			'ALTER FOREIGN TABLE ' . named('b', pick(@fit_types)) . " OPTIONS (" . pick('ADD', 'SET') . " $name '$value')";
		},
		14 => sub {
			my ($name, $value) = chance(80) ? mild_option() : option();
			"CREATE FOREIGN TABLE IF NOT EXISTS $b (" . $column->() . ", n bigint" . (chance(50) ? ' DEFAULT 1' : '')
			  . ") SERVER statbuffer OPTIONS ($name '$value'" . (chance(70) && $name ne 'handler' ? ", handler 'take'" : '') . ')';
		},
		2 => sub {
			"CREATE FOREIGN TABLE IF NOT EXISTS $b (" . join(', ', map { "k$_ " . column_type() } 1 .. number(0, 4))
			  . ') SERVER statbuffer';
		},
		1 => "CREATE FOREIGN TABLE IF NOT EXISTS pg_temp.$b (key text, n bigint DEFAULT 1)"
		  . " SERVER statbuffer OPTIONS (handler 'take', interval '0')",
		4 => "DROP FOREIGN TABLE IF EXISTS $b",
		1 => "DROP FOREIGN TABLE IF EXISTS $b, ${b}_x, other.$b CASCADE",
		2 => "CREATE OR REPLACE TRIGGER t BEFORE INSERT ON $k FOR EACH ROW EXECUTE FUNCTION meddle()",
		1 => "CREATE OR REPLACE TRIGGER u AFTER INSERT ON $k FOR EACH ROW EXECUTE FUNCTION meddle()",
		1 => "CREATE TRIGGER v AFTER INSERT ON $k REFERENCING NEW TABLE AS news FOR EACH STATEMENT EXECUTE FUNCTION meddle()",
		1 => "DROP TRIGGER IF EXISTS t ON $k",
		2 => sub { 'TRUNCATE ' . buffer() },
		1 => sub { 'TRUNCATE ' . buffer() . ', ' . buffer() . ' RESTART IDENTITY CASCADE' },
		1 => 'TRUNCATE s_parent, a_partitioned',
		1 => 'ALTER TYPE shifty ADD ATTRIBUTE c int',
		1 => 'ALTER TYPE shifty DROP ATTRIBUTE c',
		$misreading ? 0 : 1 => 'ALTER TYPE shifty ALTER ATTRIBUTE a TYPE bigint CASCADE',
		$misreading ? 0 : 1 => 'ALTER TYPE shifty ALTER ATTRIBUTE a TYPE int CASCADE',
		1 => 'ALTER TABLE holed ADD COLUMN z int',
		1 => 'ALTER TABLE holed DROP COLUMN z',
		1 => 'ALTER TABLE toasted ADD COLUMN z int',
		1 => 'ALTER TABLE toasted DROP COLUMN z',
		1 => 'DROP DOMAIN IF EXISTS fleeting CASCADE',
		2 => 'CREATE DOMAIN fleeting AS int CHECK (VALUE > 0)',
		1 => "ALTER TYPE mood_t ADD VALUE IF NOT EXISTS 'mad'",
		1 => "ALTER TYPE mood_t RENAME VALUE 'sad' TO 'sad'",
		1 => 'ALTER DOMAIN positive DROP CONSTRAINT IF EXISTS small',
		1 => 'ALTER DOMAIN positive ADD CONSTRAINT small CHECK (VALUE < 7)',
		1 => sub { 'DROP FOREIGN TABLE IF EXISTS ' . named('k', 'text') },
		2 => sub { 'GRANT ' . pick('INSERT', 'SELECT', 'ALL', 'SELECT (key)', 'INSERT (key, n)') . " ON $k TO fuzz_writer" },
		1 => sub { 'REVOKE ' . pick('INSERT', 'SELECT', 'ALL', 'SELECT (key)') . " ON $k FROM fuzz_writer, fuzz_owner" },
		1 => "CREATE OR REPLACE FUNCTION fleeting_take(anyelement, bigint) RETURNS void LANGUAGE sql AS ''",
		1 => 'DROP FUNCTION IF EXISTS fleeting_take(anyelement, bigint)');
}

# What the ledger knows of: in one statement, so that both are or both are not
sub control
{
	my $k = number(1, 200);
	my $n = number(-5, 100);

	return draw(
		10 => "SELECT control('c$k', $n)",
		3 => "SELECT control('c' || g, $n) FROM generate_series($k, $k + 50) AS g",
		4 => "WITH l AS (INSERT INTO ledger SELECT 'c' || g, $n FROM generate_series($k, $k + 20) AS g RETURNING *)"
		  . ' INSERT INTO control SELECT * FROM l',
		2 => "SELECT control('large $k', 1099511627777), control('large $k', -1099511627776)",
		4 => 'SELECT control_async()',
		2 => sub { 'SELECT control(\'c1\', 1), ' . call() },
		2 => "SELECT try('SELECT control(''tried'', 1), 1 / 0', 1), control('c2', 1)",
		1 => "SELECT nest('SELECT control(''nested'', 1)', " . number(1, 80) . ')',
		1 => "CALL in_a_loop('SELECT control(''loop'', 1)', 5)");
}

# Any one statement that a client could send
sub statement
{
	return draw(
		40 => \&query,
		14 => \&insertion,
		14 => \&selection,
		2 => \&refused,
		6 => \&control,
		8 => \&definition,
		4 => sub { 'SELECT try(' . quoted(statement()) . ', ' . number(0, 3) . ')' },
		1 => sub { 'SELECT nest(' . quoted(query()) . ', ' . number(1, 70) . ')' },
		2 => sub { 'SELECT as_owner(' . quoted(query()) . ')' },
		1 => sub { 'CALL in_a_loop(' . quoted(query()) . ', 4)' },
		2 => sub { 'DO ' . quoted('BEGIN PERFORM 1; ' . statement_in_block() . ' END') },
		1 => sub { statement() . '; ' . statement() });
}

sub statement_in_block
{
	return draw(
		2 => sub { 'EXECUTE ' . quoted(statement()) . ';' },
		1 => sub { 'FOR i IN 1 .. 5 LOOP PERFORM ' . call('i') . '; END LOOP;' },
		1 => sub {
			'BEGIN PERFORM ' . call() . "; RAISE 'inner'; EXCEPTION WHEN raise_exception THEN PERFORM " . call() . '; END;';
		});
}

1;
