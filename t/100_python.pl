# Python's clients count: psycopg 2 and 3, asyncpg, SQLAlchemy and Django; and
# what Alembic makes of buffers.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use ClientTest;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my ($python) = programs('python3') or plan skip_all => 'python3 is not installed';
my $node = client_node('python');
my $tested = 0;

# The programs are in a directory that is not ours to write to.
$ENV{PYTHONDONTWRITEBYTECODE} = 1;

sub has
{
	my ($package, @modules) = @_;
	my $has = can_run($package, $python, '-c', join ';', map { "import $_" } @modules);

	$tested++ if $has;
	return $has;
}

# --- drivers ----------------------------------------------------------------

if (has('python3-psycopg2', 'psycopg2'))
{
	my $seen = run_client({}, $python, program('python/with_psycopg2.py'));

	is($seen->{own}, 'True', 'a tuple is a key of two columns');
	is($seen->{rows}, 1, 'an UPDATE of the view tells that it has updated a row');
	is($seen->{returned}, 3, 'RETURNING has what was added');
	is($seen->{flush}, 'must be owner of foreign table hits', 'only the owner flushes');
	counted('psycopg2', $seen, readonly => 1);
}

if (has('python3-psycopg', 'psycopg'))
{
	my $seen = run_client({}, $python, program('python/with_psycopg3.py'));

	is($seen->{row}, '42P18', 'parameters in ROW() have no type');
	is($seen->{'binary total'}, 2, 'a total in binary');
	is($seen->{rows}, 1, 'an UPDATE of the view tells that it has updated a row');
	is($seen->{returned}, 3, 'RETURNING has what was added, in a pipeline');
	counted('psycopg3', $seen, binary => 10, readonly => 1);
}

if (has('python3-asyncpg', 'asyncpg'))
{
	my $seen = run_client({}, $python, program('python/with_asyncpg.py'));

	is($seen->{row}, '42P18', 'parameters in ROW() have no type');
	is($seen->{rows}, 'UPDATE 1', 'an UPDATE of the view tells that it has updated a row');
	is($seen->{returned}, 3, 'RETURNING has what was added');
	counted('asyncpg', $seen, pool => 100, readonly => 1);
}

# --- SQLAlchemy -------------------------------------------------------------

if (has('python3-sqlalchemy', 'sqlalchemy', 'psycopg2'))
{
	my $seen = run_client({}, $python, program('python/with_sqlalchemy.py'));

	note("SQLAlchemy $seen->{version}");
	is($seen->{tables}, 'articles page_views visits', 'buffers are not among the tables that it finds');
	is($seen->{views}, 'article', 'the view is among the views');
	is($seen->{'foreign tables'}, 'article_counts hits visit_counts', 'buffers are foreign tables');
	is($seen->{columns}, 'path TEXT NOT NULL, views BIGINT NOT NULL', 'the columns of one');
	is($seen->{rows}, 1, 'an UPDATE of the view tells that it has updated a row');
	is($seen->{read}, 0, 'what it has inserted in the view it reads again');
	is($seen->{computed}, 1, 'a value that it has computed itself is absolute');
	is($seen->{deleted}, 'True', 'a row of the view is deleted');
	is($seen->{update}, '0A000', 'the buffer cannot be updated');
	counted('sqlalchemy', $seen, orm => 16);
}

if (has('python3-alembic', 'alembic', 'psycopg2'))
{
	my $seen = run_client({ client_environment(undef, 'shop', 'shop_owner') }, $python, program('python/with_alembic.py'));

	is($seen->{without}, 'add_table article, add_table hits', 'it would create what it does not look for');
	is($seen->{with}, 'none', 'unless env.py says that it must not');
	is($seen->{unknown}, 'none', 'what no model knows it leaves alone');
	is($seen->{made}, 1, 'a migration makes a buffer');
	is($seen->{dropped}, 'True', 'and drops it');
}

# --- Django -----------------------------------------------------------------

if (has('python3-django', 'django', 'psycopg2'))
{
	my $seen = run_client({}, $python, program('python/with_django.py'));

	note("Django $seen->{version}");
	like($seen->{save}, qr/^cannot update buffer "hits"/, 'save() of a buffer would update it');
	is($seen->{rows}, 1, 'an UPDATE of the view tells that it has updated a row');
	is($seen->{computed}, 1, 'a value that it has computed itself is absolute');
	is($seen->{renamed}, 1, 'another column is updated, with the row locked');
	is($seen->{deleted}, 1, 'a row of the view is deleted');
	is($seen->{found}, 'False', 'a row of the view is found');
	counted('django', $seen);

	# Its tests make a database of their own, in which the extension is if it is
	# in the template.
	$node->safe_psql('template1', q{
		CREATE EXTENSION statbuffer;
		GRANT USAGE ON FOREIGN SERVER statbuffer TO shop_owner;
		GRANT CREATE ON SCHEMA public TO shop_owner;
	});
	sql('ALTER ROLE shop_owner CREATEDB');
	$seen = run_client({ client_environment(undef, 'shop', 'shop_owner') }, $python, program('python/with_django.py'), 'test');
	is($seen->{failures}, 0, 'tests of an application succeed');
	is($seen->{migrations}, 'complete', 'its migrations make the models');
	is(sql(q{SELECT count(*) FROM pg_database WHERE datname LIKE 'test%'}), '0', 'the database of the tests is gone');
}

plan skip_all => 'none of these clients is installed' unless $tested;
has_not_crashed($node, 'no process has crashed');
$node->stop;
done_testing();
