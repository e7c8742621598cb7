# Definitions that change between two calls of one statement: the functions
# named d_* alter what they are called in.  See fuzz_ddl.sql.

package FuzzStruck;

use strict;
use warnings;

use Exporter 'import';
use FuzzDraws;
use FuzzSession qw(simple extended copy_in);
use FuzzStatements;

our @EXPORT = qw(struck_unit);

my @struck = qw(d_pair d_single d_composite d_checked d_sorted d_mixed);

sub struck_row_of { return "d_row_of('" . pick(qw(d_row d_row d_second pg_temp.d_temp other.d_else d_row_domain)) . "')"; }

sub struck_key
{
	return draw(
		12 => \&struck_row_of,
		3 => 'ROW(d_text(), d_number())',
		2 => "ROW(ROW('k')::d_source, ROW('7')::d_source)",
		2 => "ROW('k')::d_source",
		2 => 'd_named()',
		2 => 'd_text()',
		2 => "'k' || g",
		2 => 'g',
		1 => "ROW('k' || g)::d_source::text",
		1 => "'(7,7)'",
		1 => "'sad'::d_enum",
		1 => "ROW(jsonb_populate_record(NULL::d_row, '{\"a\": 7, \"b\": 7}'), 'sad'::d_enum)",
		1 => "'k'::d_domain",
		1 => "('k' || g)::text::d_ordered",
		1 => "(7,7)::text::d_row_domain",
		1 => "NULL::d_row",
		1 => sub { value(pick(@types)) });
}

sub struck_call
{
	my $b = pick(@struck);
	my $key = struck_key();

	return draw(
		10 => sub { "sb_increment($key, " . number(-3, 9) . ", '$b')" },
		3 => sub { "sb_async_increment($key, " . number(-3, 9) . ", '$b')" },
		3 => "sb_count($key, '$b')",
		1 => "sb_flush($key, '$b')",
		1 => "sb_increment($key, d_number(), '$b')",
		1 => "sb_increment(d_text(), d_number(), '$b'), sb_count($key, '$b')");
}

# The values of a row of one of the buffers, which may have changed
my %struck_row = (
	d_pair => [ 'd_text(), d_number()', "ROW('k')::d_source, ROW('k' || g)::d_source", "'k' || g, g" ],
	d_single => [ 'd_text()', "ROW('k')::d_source", "'k' || g" ],
	d_composite => [ "jsonb_populate_record(NULL::d_row, '{\"a\": 7, \"b\": 7}')", 'd_named()', 'ROW(d_text(), g)::d_row' ],
	d_checked => [ 'd_text()', "'k' || g", "('k' || g)::d_domain" ],
	d_sorted => [ "('k' || g % 5)::text::d_ordered", 'd_text()::d_ordered' ],
	d_mixed => [ "ROW('k', g)::d_row_domain, 'sad'::d_enum", "ROW(d_text(), g)::d_row, 'glad'" ]);

sub struck_query
{
	my $call = struck_call();
	my $other = struck_call();
	my $b = pick(@struck);
	my $c = pick(@struck);
	my $row = pick(@{ $struck_row{$b} });
	my $many = 'generate_series(1, ' . pick(2, 5, 20) . ') AS g';
	my $percent = pick('10', '40', '100', "40, NULL, '$b'", "40, 'd_row'");

	return draw(
		10 => "SELECT $call FROM $many",
		8 => "SELECT $call, d_strike($percent) FROM $many",
		4 => "SELECT $call, $other FROM $many",
		3 => "SELECT $call FROM $many WHERE d_strike($percent) IS NOT NULL",
		2 => "SELECT count(*) FROM (SELECT $call OFFSET 0) s, $many",
		6 => "INSERT INTO $b SELECT $row, g FROM $many",
		4 => "INSERT INTO $b SELECT $row, d_number() FROM $many RETURNING *, d_strike($percent)",
		2 => "INSERT INTO d_single (n) SELECT g FROM $many",
		2 => 'INSERT INTO d_single DEFAULT VALUES',
		1 => "INSERT INTO $b SELECT * FROM $c",
		3 => "INSERT INTO d_liked SELECT ROW('k' || g)::d_source, ROW('7')::d_source, 'x' FROM $many",
		1 => "INSERT INTO d_liked SELECT d_text(), d_number(), 'x' FROM $many",
		2 => "UPDATE d_liked SET a = ROW('u')::d_source, b = ROW('8')::d_source",
		1 => "UPDATE d_liked SET other = d_text()",
		1 => 'DELETE FROM d_liked',
		4 => "SELECT x.*, d_strike($percent) FROM $b x",
		2 => "SELECT x::text, d_strike($percent) FROM $b x",
		2 => "SELECT x.*, y.*, d_strike(10) FROM $b x, $c y LIMIT 100",
		1 => "SELECT * FROM $b x WHERE d_strike($percent) IS NOT NULL ORDER BY a",
		1 => "SELECT DISTINCT a FROM $b WHERE d_strike(20) IS NOT NULL",
		2 => "SELECT k.*, d_strike($percent) FROM sb_keys('$b') k",
		1 => "SELECT sb_keys('$b'), d_strike($percent) FROM $many",
		2 => "SELECT *, d_strike(10) FROM sb_stat_buffers WHERE buffer ~ 'd_'",
		1 => "SELECT sb_drain('$b', '50ms')",
		2 => "SELECT sb_flush_all('$b')",
		2 => "WITH i AS (INSERT INTO $b SELECT $row, g FROM $many RETURNING *) SELECT i, $call FROM i, generate_series(1, 2) AS g");
}

sub struck_loop
{
	my $call = struck_call() =~ s/\bg\b/i/gr;
	my $other = struck_call() =~ s/\bg\b/i/gr;
	my $b = pick(@struck);
	my $row = pick(@{ $struck_row{$b} }) =~ s/\bg\b/i/gr;

	return 'DO ' . quoted('DECLARE r record; i int := 1; c refcursor; BEGIN ' . draw(
		4 => "FOR i IN 1 .. 10 LOOP PERFORM $call; PERFORM d_strike(50); END LOOP;",
		2 => "FOR i IN 1 .. 10 LOOP BEGIN PERFORM $call; PERFORM d_strike(50); EXCEPTION"
		  . ' WHEN internal_error THEN RAISE; WHEN OTHERS THEN NULL; END; END LOOP;',
		2 => "FOR i IN 1 .. 10 LOOP BEGIN INSERT INTO $b SELECT $row, 1; PERFORM d_strike(50); EXCEPTION"
		  . ' WHEN internal_error THEN RAISE; WHEN OTHERS THEN NULL; END; END LOOP;',
		3 => "FOR r IN SELECT * FROM $b LOOP PERFORM d_strike(50); PERFORM $call; END LOOP;",
		2 => "FOR r IN SELECT $call FROM generate_series(1, 120) AS i LOOP PERFORM d_strike(20); END LOOP;",
		2 => "FOR r IN SELECT k.* FROM sb_keys('$b') k LOOP PERFORM d_strike(50); END LOOP;",
		2 => "OPEN c FOR SELECT $call, $other FROM generate_series(1, 20) AS i;"
		  . ' FOR i IN 1 .. 10 LOOP FETCH c INTO r; PERFORM d_strike(60); END LOOP; CLOSE c;',
		1 => "OPEN c FOR SELECT * FROM $b;"
		  . ' FOR i IN 1 .. 10 LOOP FETCH c INTO r; PERFORM d_strike(60); END LOOP; CLOSE c;') . ' END');
}

# In one statement with the ledger, so that both are or both are not
sub struck_control
{
	my $l = "WITH l AS (INSERT INTO ledger SELECT 'rows', g FROM generate_series(1, " . number(1, 9) . ') g RETURNING n)';

	return draw(
		6 => sub { "$l SELECT sb_increment(" . struck_row_of() . ", n, 'b_rows') FROM l" },
		2 => "$l SELECT sb_increment(ROW(ROW('k')::d_source, ROW('7')::d_source), n, 'b_rows'), d_strike(40) FROM l",
		2 => "$l SELECT sb_increment(ROW(d_text(), d_number()), n, 'b_rows') FROM l",
		2 => "$l SELECT sb_increment(d_named(), n, 'b_rows') FROM l",
		3 => "$l INSERT INTO b_rows SELECT d_text(), d_number(), n FROM l",
		1 => "$l INSERT INTO b_rows SELECT ROW('k')::d_source, ROW('7')::d_source, n FROM l",
		1 => "$l INSERT INTO b_rows SELECT 'k', d_number(), n FROM l RETURNING d_strike(40), *");
}

sub struck_statement
{
	return draw(
		30 => \&struck_query,
		8 => \&struck_loop,
		8 => \&struck_control,
		2 => 'SELECT d_strike(100)',
		2 => 'SELECT d_make()',
		1 => 'SELECT d_remake()',
		1 => sub { 'SELECT try(' . quoted(struck_query()) . ', ' . number(0, 2) . ')' },
		1 => sub { 'SELECT nest(' . quoted(struck_query()) . ', ' . number(1, 9) . ')' });
}

sub struck_several { return map { simple(struck_statement()) } 1 .. number(2, 8); }

sub struck_transaction
{
	my @messages = simple('BEGIN');

	foreach (1 .. number(2, 7))
	{
		push @messages, simple('SAVEPOINT guard'), simple(struck_statement());
		$messages[-1]{on_error} = 'ROLLBACK TO guard';
		push @messages, simple('ROLLBACK TO guard') if chance(15);
	}
	return (@messages, simple(pick('COMMIT', 'COMMIT', 'ROLLBACK')));
}

# Not WITH HOLD: an exception that is caught during COMMIT, while such a cursor's
# rows are fetched, fails an assertion of PostgreSQL's own (xact.c).
sub struck_cursor
{
	my @messages = (simple('BEGIN'), simple('DECLARE c CURSOR FOR ' . draw(
		3 => sub { 'SELECT ' . struck_call() . ' FROM generate_series(1, 50) AS g' },
		1 => sub { 'SELECT * FROM ' . pick(@struck) },
		1 => sub { 'SELECT * FROM sb_keys(' . quoted(pick(@struck)) . ')' })));

	foreach (1 .. number(2, 6))
	{
		push @messages, map { simple('SAVEPOINT guard'), { %{ simple($_) }, on_error => 'ROLLBACK TO guard' } }
		  'FETCH ' . number(1, 3) . ' FROM c', draw(4 => 'SELECT d_strike(100)', 1 => \&struck_statement);
	}
	return (@messages, simple(pick('COMMIT', 'COMMIT', 'ROLLBACK')));
}

sub struck_prepared
{
	return (
		simple('PREPARE p AS ' . draw(4 => \&struck_query, 1 => \&struck_control)),
		(map { (simple('EXECUTE p'), simple(chance(70) ? 'SELECT d_strike(100)' : struck_statement())) } 1 .. number(1, 6)),
		simple('DEALLOCATE ALL'));
}

sub struck_copy
{
	my $b = pick(@struck);
	my $keys = $b =~ /pair|mixed/ ? 2 : 1;
	my $data = join '', map { join("\t", (pick('7', 'sad', '(7,7)', '\\N')) x $keys, $_) . "\n" } 1 .. number(1, 20);

	return draw(3 => sub { copy_in("COPY $b FROM STDIN", $data) }, 1 => sub { simple("COPY (SELECT * FROM $b) TO STDOUT") });
}

# A statement for each row that is fetched
sub struck_by_extended_protocol { return map { extended(struck_query(), pick(0, 1, 2)) } 1 .. number(1, 4); }

sub struck_unit
{
	my @messages = draw(
		10 => \&struck_several,
		6 => \&struck_transaction,
		5 => \&struck_cursor,
		4 => \&struck_prepared,
		2 => sub { map { struck_copy() } 1 .. number(1, 3) },
		2 => \&struck_by_extended_protocol);

	unshift @messages, simple('SET ROLE ' . pick('fuzz_owner', 'fuzz_writer', 'fuzz_writer')) if chance(40);
	unshift @messages, simple('SET plan_cache_mode = force_generic_plan') if chance(20);
	unshift @messages, simple('SET debug_discard_caches = 1') if chance(2);
	return (simple(chance(20) ? 'SELECT d_remake()' : 'SELECT d_make()'), @messages);
}

1;
