// Hibernate, with a model on the view that is updated as it was read: the row must
// have all values that it had.

import java.util.Properties;
import javax.persistence.Entity;
import javax.persistence.Id;
import javax.persistence.Table;
import org.hibernate.Session;
import org.hibernate.SessionFactory;
import org.hibernate.StaleObjectStateException;
import org.hibernate.annotations.OptimisticLockType;
import org.hibernate.cfg.Configuration;

public class WithHibernate {
	static final String ME = "hibernate";

	@Entity
	@org.hibernate.annotations.Entity(dynamicUpdate = true, optimisticLock = OptimisticLockType.ALL)
	@Table(name = "article")
	public static class Article {
		@Id public Integer id;
		public String title;
		public Long views;
	}

	@Entity
	@Table(name = "hits")
	public static class Hit {
		@Id public String path;
		public Long views = 1L;
	}

	static void seen(String what, Object value) {
		System.out.println(what + ": " + value);
	}

	static SessionFactory sessions;

	static Object value(Session session, String statement) {
		return session.createSQLQuery(statement).uniqueResult();
	}

	// Reads an article, and adds 1 to its views.
	static Session begin(Integer id) {
		Session session = sessions.openSession();
		session.beginTransaction();
		Article article = (Article) session.get(Article.class, id);
		article.views++;
		return session;
	}

	static String commit(Session session) {
		try {
			session.getTransaction().commit();
			return "counted";
		} catch (StaleObjectStateException error) {
			session.getTransaction().rollback();
			return "stale";
		} finally {
			session.close();
		}
	}

	static Integer create(String title) {
		Session session = sessions.openSession();
		session.beginTransaction();
		Integer id = (Integer) value(session, "INSERT INTO article (title) VALUES ('" + title + "') RETURNING id");
		session.getTransaction().commit();
		session.close();
		return id;
	}

	public static void main(String[] args) {
		// what is run from its source is in a class loader of its own
		Thread.currentThread().setContextClassLoader(WithHibernate.class.getClassLoader());
		Properties properties = new Properties();
		properties.setProperty("hibernate.connection.driver_class", "org.postgresql.Driver");
		properties.setProperty("hibernate.connection.url", System.getenv("JDBC_URL"));
		properties.setProperty("hibernate.dialect", "org.hibernate.dialect.PostgreSQLDialect");
		sessions = new Configuration().setProperties(properties)
			.addAnnotatedClass(Article.class).addAnnotatedClass(Hit.class).buildSessionFactory();

		// A model on the buffer is inserted.
		for (int i = 0; i < 2; i++) {
			Session session = sessions.openSession();
			session.beginTransaction();
			Hit hit = new Hit();
			hit.path = ME + "/one";
			session.save(hit);
			session.getTransaction().commit();
			session.close();
		}

		// HQL adds in the database; what a session has read and increments is an
		// absolute value, and only if nobody has counted since.
		Integer id = create(ME);
		Session session = sessions.openSession();
		session.beginTransaction();
		seen("hql", session.createQuery("update WithHibernate$Article set views = views + 1 where id = :id")
			.setInteger("id", id).executeUpdate());
		session.getTransaction().commit();
		session.close();
		seen("as read", commit(begin(id)));
		Session late = begin(id);
		seen("meanwhile", commit(begin(id)));
		seen("late", commit(late));

		// Two that have both found the row before the other one commits
		Integer both = create(ME + " both");
		Session one = begin(both);
		Session two = begin(both);
		one.flush();
		two.flush();
		seen("both", commit(one) + " and " + commit(two));

		session = sessions.openSession();
		seen("total", value(session, "SELECT sb_total('" + ME + "/one', 'hits')"));
		seen("verb", value(session, "SELECT views FROM article WHERE id = " + id));
		seen("verb of both", value(session, "SELECT views FROM article WHERE id = " + both));
		session.close();
		sessions.close();
	}
}
